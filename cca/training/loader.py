"""Items of the global batches as one process takes them, and images that cannot be read."""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cca.data.sources import TokenSource
from cca.distributed import Processes, children_ignore_signals
from cca.training.schedule import TrainingConfig, global_batches
from models import UserError

UNREADABLE_SHARE = 0.001  # of all images; beyond it the run stops


def own_items(
    data: TokenSource, config: TrainingConfig, done: int, share: slice, workers: int
) -> Iterator[list[Tensor]]:
    """This process's part of every global batch from step ``done``: (items, unreadable indices)."""
    batches = (
        [(epoch, int(i)) for i in indices[share]]
        for epoch, indices in global_batches(len(data), config, done)
    )
    loader = DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork" if workers else None,
    )
    with children_ignore_signals():
        return iter(loader)


class Unreadable:
    """Images that could not be read, by path, over all processes."""

    def __init__(self, data: TokenSource, processes: Processes):
        self.data, self.processes = data, processes
        self.own: set[int] = set()
        self.total = 0

    def report(self, flags: Tensor) -> int:
        """Note one batch's unreadable indices (-1: readable); returns how many are new here."""
        new = set(flags[flags >= 0].tolist()) - self.own
        self.own |= new
        for index in new:
            tqdm.write(
                f"unreadable, replaced by another image of its class: {self.data.name(index)}",
                file=sys.stderr,
            )
        return len(new)

    def add(self, count: int) -> None:
        self.total += count
        if self.total > UNREADABLE_SHARE * len(self.data):
            raise UserError(
                f"--data: {self.total} of {len(self.data)} images cannot be read, "
                f"more than {UNREADABLE_SHARE:.1%}; their paths are above"
            )
