import shutil
import signal

import pytest
import torch
from specimens import SPECIMENS, register


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, SIGHUP is ignored


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """Register the specimen models, and change to a copy of the folder that their options refer to."""
    shutil.copytree(SPECIMENS, tmp_path / "disk")
    monkeypatch.chdir(tmp_path / "disk")
    register(monkeypatch)
    return tmp_path / "disk"
