"""Data-loading workers: processes that read the items of a data set ahead of the work."""

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
    """Yield ``data[key]`` of each key in order, read ahead by data-loading workers.

    Args:
        workers: their number; 0: items are read when they are needed.
        batch_size: so many items at a time, stacked.
        ranks: those that all read as many items, into pinned memory for a GPU: where one of them cannot
            read, all end.

    Raises:
        UserError: a worker ended, or its items do not fit in shared memory.
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
    """Move an item's tensors into shared memory, and return it.

    Called in a worker, so that the command gets the error where that memory is full. PyTorch would move
    them later, in a thread of the worker; an error there drops the item, and the command would wait for it
    for ever.
    """
    if isinstance(item, Tensor):
        item.share_memory_()
    elif is_dataclass(item) or isinstance(item, (tuple, list)):
        for part in vars(item).values() if is_dataclass(item) else item:
            share(part)
    return item


def from_workers(loader: DataLoader) -> Iterator[Any]:
    """Yield what the loader does. Raises UserError where a worker ends, or shared memory is full."""
    items, count = None, loader.num_workers
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        with children_ignore_signals():
            items = iter(loader)
        if count and threading.current_thread() is threading.main_thread():
            # PyTorch's handler raises as soon as a worker ends, whatever the command is doing then.
            signal.signal(signal.SIGCHLD, handler)
        yield from items
    except (OSError, RuntimeError) as error:
        if "DataLoader worker (pid" in str(error):
            problem = f"one of {count} data-loading workers was killed, perhaps because the memory was full"
        elif "shared memory" in str(error) or isinstance(error, OSError) and error.filename is None:
            last_line = str(error).strip().splitlines()[-1]  # the worker's own, below its traceback
            why = getattr(error, "strerror", None) or last_line.rpartition(": ")[2]
            problem = f"{count} data-loading workers find no room in the shared memory, /dev/shm ({why})"
        else:
            raise
        raise UserError(f"--workers: {problem}; take fewer workers, or give more memory") from None
    finally:
        if items is not None and count:
            # Else Python waits at its end for workers that an error keeps.
            items._shutdown_workers()  # type: ignore[attr-defined]
