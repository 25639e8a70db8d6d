"""The batch of an optimizer step, and the sums from which its metrics are computed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from models.utils.precision import upload


@dataclass(frozen=True)
class Batch:
    """n images and what a loss needs of each. A loss that needs another tensor adds a field.

    images: tokens int64 [n, L], or pixels uint8 [n, 3, H, W], which the trainer encodes.
    labels: classes int64 [n]; the null class where ``uncond`` is set.
    negatives: classes int64 [n] to contrast with; the null class where ``uncond`` is set.
    uncond: bool [n], entries that are trained without their class.

    All fields except the images are on the CPU: the trainer counts entries without a wait for the GPU.
    """

    images: Tensor
    labels: Tensor
    negatives: Tensor
    uncond: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def same_label(self) -> Tensor:
        """Whether the negative class of each entry is its own class (null class included): bool [n]."""
        return self.labels == self.negatives

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return a batch with ``function`` applied to each tensor."""
        return Batch(**{field.name: function(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda tensor: upload(tensor, device))

    def pin_memory(self) -> "Batch":
        """Return a copy in pinned memory. PyTorch's DataLoader calls this where there is a GPU."""
        return self.map(Tensor.pin_memory)

    def micro_batches(self, size: int) -> Iterator["Batch"]:
        """Yield consecutive parts of at most ``size`` images."""
        for start in range(0, len(self), size):
            yield self.map(lambda tensor: tensor[start : start + size])  # noqa: B023, called at once


Sums = dict[str, tuple[Tensor, int]]


def sum_values(values: dict[str, Tensor], scale: float = 1.0) -> Sums:
    """Return, for each tensor [n], ``scale`` times its sum, and n. Such sums of parts of a batch add up.

    A sum is a float64 scalar without gradient on the tensor's device. The host does not wait for it.
    """
    return {name: (scale * part.detach().sum().double(), len(part)) for name, part in values.items()}


def diagnostics(
    logps: tuple[Tensor, Tensor], rewards: tuple[Tensor, Tensor], null_entries: Tensor, scale: float
) -> Sums:
    """Return the sums of a micro-batch's rewards and log-likelihoods, under TRL's names for the metrics.

    Args:
        logps: log p(x_i|c_i) and log p(x_i|c_i-) of a micro-batch, each [B], in nats.
        rewards: r(x_i, c_i), the chosen one, and r(x_i, c_i-), the rejected one, each [B], in nats.
        null_entries: indices [n] int64 of the batch entries with the null class.
        scale: factor of the rewards; see ``Loss.reward_scale``.
    """
    (logp, negative_logp), (reward, negative_reward) = logps, rewards
    return {
        **sum_values({"rewards/chosen": reward, "rewards/rejected": negative_reward}, scale),
        **sum_values(
            {"rewards/margins": reward - negative_reward, "rewards/null": reward[null_entries]}, scale
        ),
        **sum_values({"rewards/accuracies": reward > negative_reward}),
        **sum_values({"logps/chosen": logp, "logps/rejected": negative_logp}),
    }
