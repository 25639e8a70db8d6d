"""What runs out: disks and a GPU's memory, from inside."""

import resource
from contextlib import contextmanager

import torch


@contextmanager
def largest_file(size: int):
    """No file may grow beyond ``size`` bytes: what writing to a full disk looks like from inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def memory_full(*_, **__):
    """Stands in for a function during which the GPU's memory runs out."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
