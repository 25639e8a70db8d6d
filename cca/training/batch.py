"""The batch of an optimizer step."""

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
