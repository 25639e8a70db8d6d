"""What is chosen by the device."""

import shutil
from types import SimpleNamespace

import pytest
import torch

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
