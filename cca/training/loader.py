"""The batches of a run: pixels or codes with their classes, one batch per optimizer step."""

from collections.abc import Iterator

import torch
from torch.utils.data import Dataset

from cca.config import TrainingConfig
from cca.data.datasets import LabelledDataset
from cca.data.reading import read_items
from cca.distributed import Ranks
from cca.losses import LOSSES, pair_labels
from cca.training.batch import Batch
from cca.training.schedule import global_batch, sample_unconditional
from cca.training.unreadable import Unreadable


class Loader(Dataset):
    """The batches of this rank, one per optimizer step, built in data-loading workers.

    The null class and the negatives are chosen for the global batch, so that they do not depend on the number
    of ranks. Indices of images that cannot be read are added to ``unreadable.new``.
    """

    def __init__(
        self,
        data: LabelledDataset,
        config: TrainingConfig,
        ranks: Ranks,
        null_class: int,
        workers: int = 0,
    ):
        self.data, self.config, self.null_class, self.workers = data, config, null_class, workers
        self.ranks, self.share = ranks, ranks.share(config.batch_size)
        self.unreadable = Unreadable(data, ranks)

    def __getitem__(self, step: int) -> tuple[Batch, list[int]]:
        """Return the batch of ``step``, and the indices of its unreadable images, which others replace."""
        epoch, indices = global_batch(step, len(self.data), self.config)
        uncond = sample_unconditional(indices, epoch, self.config)
        labels, negatives = pair_labels(
            self.data.labels(indices), uncond, self.null_class, LOSSES[self.config.loss].negatives
        )
        own = self.share
        items, is_replaced = zip(*(self.data[epoch, int(index)] for index in indices[own]))
        batch = Batch(torch.stack(items), labels[own], negatives[own], uncond[own])
        return batch, indices[own][list(is_replaced)].tolist()

    def batches(self, start: int) -> Iterator[Batch]:
        """Yield the batch of each step from ``start`` to the last one."""
        steps = range(start, self.config.max_steps)
        for batch, unreadable in read_items(self, steps, self.workers, ranks=self.ranks):
            self.unreadable.new.update(unreadable)
            yield batch
