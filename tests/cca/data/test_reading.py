"""Data-loading workers: order of the items, and one error line for a killed worker or full shared memory."""

import multiprocessing
import os
import signal
import subprocess
import time

import pytest
import torch
from commands import ROOT, command_line, environment
from made_data import make_image_folder
from torch.utils.data import Dataset

from cca.data.reading import read_items
from models.utils.errors import UserError

MOUNT = "mount -t tmpfs -o size=64k tmpfs /dev/shm"


class Numbers(Dataset):
    """Dataset whose item i is the number i; the process that reads item ``deadly`` kills itself."""

    def __init__(self, deadly=None):
        self.deadly = deadly

    def __getitem__(self, key):
        if key == self.deadly:
            time.sleep(0.5)  # wait until the previous item has arrived
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((3,), key), key % 2 == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_items_come_in_order(workers):
    items = list(read_items(Numbers(), [3, 1, 2], workers))
    assert [(item.tolist(), even) for item, even in items] == [([3] * 3, 0), ([1] * 3, 0), ([2] * 3, 1)]
    stacked = [len(even) for _, even in read_items(Numbers(), range(5), workers, 2)]
    assert stacked == [2, 2, 1] and not multiprocessing.active_children()


def test_killed_worker_raises_at_the_next_item():
    """No error interrupts the command while it uses the previous item, and the other workers end."""
    items = read_items(Numbers(deadly=2), range(8), 2)
    next(items)
    end = time.monotonic() + 2
    while time.monotonic() < end:  # PyTorch's handler of SIGCHLD would raise here
        time.sleep(0.05)
    with pytest.raises(UserError, match="^--workers: one of 2 data-loading workers was killed.*memory"):
        list(items)
    assert not multiprocessing.active_children()


def run_with_small_shared_memory(line):
    inner = ["unshare", "-m", "bash", "-c", f'{MOUNT} && exec "$@"', "bash", *line]
    return subprocess.run(inner, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "bash", "-c", MOUNT], capture_output=True).returncode != 0,
    reason="needs the right to mount",
)
@pytest.mark.parametrize("command", ["train", "extract", "evaluate"])
def test_small_shared_memory(tmp_path, command):
    make_image_folder(tmp_path / "photos", 100)
    photos, output = tmp_path / "photos" / "train", ["--output", tmp_path / "out"]
    arguments = {
        "train": ["train_var_cca.py", "--model", "var-mini", "--data", photos, "--max-steps", 3, *output],
        "extract": ["-m", "scripts.extract_codes", "--model", "llamagen-mini", "--data", photos, *output],
        "evaluate": ["eval_fid.py", "--reference", photos, "--samples", photos, "--features", "mini"],
    }[command]
    if command == "evaluate":
        next(path for path in photos.rglob("*.png") if path.stat().st_size == 100).unlink()
    line = command_line([*arguments, "--workers", 1], processes=2 if command == "train" else 1)
    result = run_with_small_shared_memory(line)
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert result.returncode != 0 and 1 <= len(errors) <= 2 and "/cca/" not in result.stderr, result.stderr
    assert all(
        "--workers: the items of 1 data-loading workers do not fit in shared memory" in e for e in errors
    )
