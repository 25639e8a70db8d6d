"""Simulations of a full disk and of GPU memory that runs out."""

import resource
from contextlib import contextmanager

import torch


@contextmanager
def largest_file(size: int):
    """Context manager in which no file may grow beyond ``size`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def memory_full(*_, **__):
    """Raise the error of a full GPU. A test replaces a function that uses the GPU with this one."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
