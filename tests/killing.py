"""Stops a command at its n-th file event, and starts it again; a program, so that it can fork.

    PYTHONPATH=.:tests python tests/killing.py SCENARIO=N,N...     # in an empty folder; N 0: every event

All imports are done once, here; each try is a forked child. Prints one JSON object a scenario: the
number of events, and for each N what went wrong, if anything. Writers in C++ show no events: with 0,
the scenarios are also killed where a file grows beyond some bytes.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path

import matplotlib.figure  # noqa: F401, which may fill a cache of its own when it is first imported
import pytest
import torch
from specimens import SPECIMENS, extract, register, weights

import sample
import train_llamagen_cca
import train_var_cca

STOPPED = 77
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def sampling(output: Path) -> None:
    options = ["--num-samples", "600", "--seed", "3", "--cfg-scale", "2", "--batch-size", "256"]
    sample.main([*weights("var"), *options, "--output", str(output / "s.npz")])


def training(output: Path) -> None:
    options = ["--max-steps", "4", "--save-every", "1", "--ema", "0.9", "--keep-states", "2"]
    train_var_cca.main([*weights("var"), "--data", "few.npz", *options, "--output", str(output)])


def training_on_codes(output: Path) -> None:
    options = ["--max-steps", "3", "--save-every", "2"]
    train_llamagen_cca.main([*weights("llamagen"), "--codes", "codes", *options, "--output", str(output)])


SCENARIOS = {
    "sampling": sampling,
    "training": training,
    "training_on_codes": training_on_codes,
    "extraction": extract,
}


class Counter:
    """An audit hook that counts changes below a folder and ends the process before the n-th."""

    def __init__(self, folder: Path, stop_at: int = 0):
        self.folder, self.stop_at, self.count = str(folder.resolve()), stop_at, 0

    def __call__(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if isinstance(path, int) or path is None:
            return
        # Deletions of a folder's content name it relative to the open folder.
        inside = os.path.abspath(os.fsdecode(path)).startswith(self.folder)
        if inside or event in ("os.remove", "os.rmdir"):
            self.count += 1
            if self.count == self.stop_at:
                os._exit(STOPPED)


def attempt(work, output: Path, stop_at: int = 0, largest: int = 0) -> tuple[int, int, str]:
    """Status, number of events and messages of one forked try."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status, text = 0, io.StringIO()
        counter = Counter(output, stop_at)
        if largest:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        sys.addaudithook(counter)
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                work(output)
            except BaseException:
                status = 1
                traceback.print_exc()
        os.write(writer, json.dumps([counter.count, text.getvalue()[-2000:]]).encode())
        os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:
        message = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count, text = json.loads(message) if message else (0, "")
    return status, count, text


def content(output: Path) -> dict:
    """What must be equal: names of all files, and what is in those that have no times in them."""
    found: dict = {}
    for path in sorted(p for p in output.rglob("*") if p.is_file() and "tensorboard" not in p.parts):
        name = str(path.relative_to(output))
        found[name] = None
        if path.suffix == ".pth" or path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            found[name] = {k: v.numpy().tobytes() for k, v in state.get("model", state).items()}
        elif (
            path.suffix in (".npz", ".npy", ".json", ".png")
            and path.name != "s.json"
            and "state" not in path.parts
        ):
            # The command names the output.
            found[name] = path.read_bytes().replace(str(output).encode(), b"OUTPUT")
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
    return found | {f"{path.relative_to(output)}/": None for path in output.rglob("*") if path.is_dir()}


def try_all(scenario: str, points: list[int]) -> dict:
    work, whole = SCENARIOS[scenario], Path(f"{scenario}-whole")
    status, count, text = attempt(work, whole)
    assert status == 0, text
    expected, wrong = content(whole), {}
    tries = [(n, 0) for n in (range(1, count + 1) if points == [0] else points)]
    tries += [(0, size) for size in (1, 5_000, 100_000)] if points == [0] else []
    for stop_at, largest in tries:
        output, name = Path(f"{scenario}-cut"), f"{scenario} {stop_at} {largest}"
        before, after = attempt(work, output, stop_at, largest), attempt(work, output)
        found = content(output)
        if before[0] not in (STOPPED, -signal.SIGXFSZ) and not largest:  # files may all be smaller
            wrong[name] = f"was not stopped: {before}"
        elif after[0]:
            wrong[name] = after[2]
        elif found != expected:
            names = [k for k in {**found, **expected} if found.get(k, 0) != expected.get(k, 0)]
            wrong[name] = f"differs in {names}"
        shutil.rmtree(output, ignore_errors=True)
    return {"events": count, "tries": len(tries), "wrong": wrong}


def main() -> None:
    torch.set_num_threads(1)
    shutil.copytree(SPECIMENS, "disk")
    os.chdir("disk")
    register(pytest.MonkeyPatch())
    for argument in sys.argv[1:]:
        scenario, points = argument.split("=")
        print(json.dumps(try_all(scenario, [int(n) for n in points.split(",")])))


if __name__ == "__main__":
    main()
