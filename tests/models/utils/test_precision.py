"""The default number of data-loading workers, and the detection of GPU memory that runs out."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from cca.cli.parser import Parser, add_workers_option
from models.utils.errors import UserError
from models.utils.precision import oom_as_user_error, oom_reason


@pytest.mark.parametrize(
    "has_gpu, cores, local_world_size, memory, expected",
    [
        (True, 128, "8", 2**34, 8),
        (True, 128, None, 2**34, 8),
        (True, 32, "8", 2**34, 4),
        (True, 4, "8", 2**34, 0),
        (True, 6, "no number", 2**34, 6),
        (True, 128, "8", 2**26, 0),  # the default shared memory of a container
        (False, 128, "8", 2**34, 0),
    ],
)
def test_default_workers(has_gpu, cores, local_world_size, memory, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=memory))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local_world_size is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    parser = Parser("", "made")
    add_workers_option(parser)
    assert parser.parse_args([]).workers == expected
    assert parser.parse_args(["--workers", "3"]).workers == 3


DRIVER = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported.\nFor debugging\n"
ALLOCATOR = "CUDA out of memory. Tried to allocate 2 GiB"
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError(f"{ALLOCATOR}. GPU 0 has 80 GiB. If"), ALLOCATOR),
        (torch.OutOfMemoryError("full"), "full"),
        (RuntimeError(DRIVER), "CUDA error: out of memory"),
        (RuntimeError(CUBLAS), CUBLAS),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "Triton Error [CUDA]: out of memory"),
        (RuntimeError("DataLoader's workers are out of shared memory"), None),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    ],
)  # fmt: skip
def test_oom_reason(error, expected):
    assert oom_reason(error) == expected


@pytest.mark.parametrize(
    "error", [ValueError("out of memory"), UserError("out of memory.npz"), RuntimeError()]
)
def test_other_errors_propagate(error):
    with pytest.raises(type(error), match=f"^{error}$"), oom_as_user_error("take fewer"):
        raise error


def test_oom_during_graph_capture():
    """The end of the capture raises another error, which hides the out-of-memory error."""

    def capture():
        try:
            raise torch.OutOfMemoryError("full")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with pytest.raises(UserError, match="^full: take fewer$"), oom_as_user_error("{why}: take fewer"):
        capture()
