"""What an optimizer step works on, and what it reports: a batch of images, sums that make its metrics."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from models.utils.precision import upload


@dataclass(frozen=True)
class Batch:
    """n images; a tensor that a loss needs of every image is one more field here.

    images: tokens int64 [n, L], or pixels uint8 [n, 3, H, W], which the trainer encodes. labels: classes
    [n] int64 after the null-class draw. negatives: the classes [n] that they are contrasted with, likewise.
    uncond: bool [n], rows of the null class. The trainer takes all but the images on the CPU, where what
    depends on them is counted.
    """

    images: Tensor
    labels: Tensor
    negatives: Tensor
    uncond: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def same_label(self) -> Tensor:
        """bool [n]: rows whose negative is no other class (the null class included)."""
        return self.labels == self.negatives

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(**{field.name: function(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda tensor: upload(tensor, device))

    def pin_memory(self) -> "Batch":
        """Called by PyTorch's DataLoader where there is a GPU."""
        return self.map(Tensor.pin_memory)

    def micro_batches(self, size: int) -> Iterator["Batch"]:
        """Consecutive parts of at most ``size`` images."""
        for start in range(0, len(self), size):
            yield self.map(lambda tensor: tensor[start : start + size])  # noqa: B023, called at once


Sums = dict[str, tuple[Tensor, int]]


def sum_values(values: dict[str, Tensor], scale: float = 1.0) -> Sums:
    """By name the sum of a tensor [n], times ``scale``, and n, so that parts of a batch add up.

    The sum is float64 [] on the tensor's device, which nothing waits for, and without a gradient.
    """
    return {name: (scale * part.detach().sum().double(), len(part)) for name, part in values.items()}


def diagnostics(
    logps: tuple[Tensor, Tensor], rewards: tuple[Tensor, Tensor], null_rows: Tensor, scale: float
) -> Sums:
    """What a step reports of its pairs, under the names that TRL gave them.

    Args:
        logps: log p(x_i|c_i) and log p(x_i|c_i-) of a micro-batch, each [B], in nats.
        rewards: r(x_i, c_i), the chosen one, and r(x_i, c_i-), the rejected one, likewise.
        null_rows: indices [n] int64 of the rows of the null class.
        scale: what rewards are multiplied by; see ``Loss.reward_scale``.
    """
    (logp, negative_logp), (reward, negative_reward) = logps, rewards
    return {
        **sum_values({"rewards/chosen": reward, "rewards/rejected": negative_reward}, scale),
        **sum_values({"rewards/margins": reward - negative_reward, "rewards/null": reward[null_rows]}, scale),
        **sum_values({"rewards/accuracies": reward > negative_reward}),
        **sum_values({"logps/chosen": logp, "logps/rejected": negative_logp}),
    }
