"""Full disks, from inside."""

import resource
from contextlib import contextmanager


@contextmanager
def largest_file(size: int):
    """No file may grow beyond ``size`` bytes: what writing to a full disk looks like from inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
