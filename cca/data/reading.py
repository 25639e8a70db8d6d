"""Data-loading workers: processes that read the items of a dataset in advance."""

import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cca.distributed import Ranks, children_ignore_signals
from models import UserError


def read_items(
    data: Dataset,
    keys: Sequence,
    workers: int,
    batch_size: int | None = None,
    ranks: Ranks | None = None,
) -> Iterator[Any]:
    """Yield ``data[key]`` for each key in order; data-loading workers read the items in advance.

    Args:
        workers: number of data-loading workers; 0 reads each item when it is needed.
        batch_size: yield stacks of this many items; None yields single items.
        ranks: ranks that all read the same number of items. Items are then in pinned memory if there is a
            GPU, and an error on one rank ends all ranks.

    Raises:
        UserError: a worker was killed, or its items do not fit in shared memory.
    """
    loader = DataLoader(
        data,
        batch_size,
        sampler=keys,
        num_workers=workers,
        collate_fn=share if workers and not batch_size else None,
        pin_memory=ranks is not None and torch.cuda.is_available(),
        multiprocessing_context="fork" if workers else None,
    )
    items, item = from_workers(loader), list[Any]()
    for _ in range(len(loader)):
        if ranks:
            ranks.run_or_abort_all(lambda: item.append(next(items)))
        else:
            item.append(next(items))
        yield item.pop()


def share(item: Any) -> Any:
    """Move the tensors of an item into shared memory, and return the item.

    It runs in the worker, so that the command gets the error if that memory is full. PyTorch would move them
    later in a thread of the worker: an error there loses the item, and the command would wait forever.
    """
    if isinstance(item, Tensor):
        item.share_memory_()
    elif is_dataclass(item) or isinstance(item, (tuple, list)):
        for part in vars(item).values() if is_dataclass(item) else item:
            share(part)
    return item


def from_workers(loader: DataLoader) -> Iterator[Any]:
    """Yield the items of a loader. Raise UserError if a worker is killed or shared memory is full."""
    items, count = None, loader.num_workers
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        with children_ignore_signals():
            items = iter(loader)
        if count and threading.current_thread() is threading.main_thread():
            # PyTorch's handler would raise when a worker ends, at any point of the command.
            signal.signal(signal.SIGCHLD, handler)
        yield from items
    except (OSError, RuntimeError) as error:
        if "DataLoader worker (pid" in str(error):
            problem = f"one of {count} data-loading workers was killed, perhaps because the memory was full"
        elif "shared memory" in str(error) or isinstance(error, OSError) and error.filename is None:
            last_line = str(error).strip().splitlines()[-1]  # the worker's message, below its traceback
            why = getattr(error, "strerror", None) or last_line.rpartition(": ")[2]
            problem = (
                f"the items of {count} data-loading workers do not fit in shared memory, /dev/shm ({why})"
            )
        else:
            raise
        raise UserError(f"--workers: {problem}; use fewer workers, or provide more memory") from None
    finally:
        if items is not None and count:
            # Without this, Python would wait at exit for workers that an error still references.
            items._shutdown_workers()  # type: ignore[attr-defined]
