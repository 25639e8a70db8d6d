"""What is chosen by the device."""

import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch

from models.devices import free_memory, full_parts, memory_named, memory_ran_out
from models.errors import UserError
from models.options import Parser, add_workers_option


@pytest.mark.parametrize(
    "gpus, cores, local, memory, expected",
    [
        (True, 128, "8", 2**34, 8),
        (True, 128, None, 2**34, 8),
        (True, 32, "8", 2**34, 4),
        (True, 4, "8", 2**34, 0),
        (True, 6, "no number", 2**34, 6),
        (True, 128, "8", 2**26, 0),  # what containers have unless told otherwise
        (False, 128, "8", 2**34, 0),
    ],
)
def test_workers_by_default(gpus, cores, local, memory, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=memory))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
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
def test_what_says_that_memory_ran_out(error, expected):
    assert memory_ran_out(error) == expected


@pytest.mark.parametrize(
    "error", [ValueError("out of memory"), UserError("out of memory.npz"), RuntimeError()]
)
def test_other_errors_pass(error):
    with pytest.raises(type(error), match=f"^{error}$"), memory_named("take fewer"):
        raise error


def test_memory_that_runs_out_while_a_graph_is_captured():
    """The end of the capture raises an error of its own."""

    def capture():
        try:
            raise torch.OutOfMemoryError("full")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with pytest.raises(UserError, match="^full: take fewer$"), memory_named("{why}: take fewer"):
        capture()


def test_what_the_work_held_is_free_where_the_error_is_caught():
    alive = []

    def work():
        held = torch.zeros(1)
        alive.append(weakref.ref(held))
        raise torch.OutOfMemoryError("full")

    with pytest.raises(UserError, match="^take fewer$") as caught, memory_named("take fewer"):
        work()
    assert caught.value.__context__ is not None and alive[0]() is None


def test_memory_that_can_be_had(monkeypatch):
    assert free_memory(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    assert free_memory(torch.device("cuda", 0)) == 3 + 40


def test_parts_of_one_size():
    parts = list(full_parts(torch.arange(10).view(5, 2), 3))
    assert [(part[:, 0].tolist(), count) for part, count in parts] == [([0, 2, 4], 3), ([6, 8, 6], 2)]
