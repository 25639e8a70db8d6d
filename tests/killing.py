"""Kill a command before its n-th file event, run it again, and compare with an uninterrupted run.

    PYTHONPATH=.:tests python tests/killing.py SCENARIO=N,N...     # in an empty folder; N = 0: every event

This is a separate program, so that it can import everything once and fork a child for each attempt. It
prints one JSON object per scenario: the number of events, the number of attempts, and the attempts that went
wrong. Code in C++ that writes files causes no audit events. With N = 0 the scenarios are therefore also
killed when a file grows beyond a limit.
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

import matplotlib.figure  # noqa: F401, its first import may write a cache
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
    """Audit hook that counts changes below a folder and ends the process before change ``stop_at``."""

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
        # shutil.rmtree gives names relative to an open folder.
        inside = os.path.abspath(os.fsdecode(path)).startswith(self.folder)
        if inside or event in ("os.remove", "os.rmdir"):
            self.count += 1
            if self.count == self.stop_at:
                os._exit(STOPPED)


def attempt(work, output: Path, stop_at: int = 0, largest: int = 0) -> tuple[int, int, str]:
    """Run ``work`` in a forked child and return exit status, number of events and output.

    The child is killed before event ``stop_at``, or when a file grows beyond ``largest`` bytes; 0 means no
    limit.
    """
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
    """Return what must be equal in two runs: all names, and the content of files that contain no times."""
    contents: dict = {}
    for path in sorted(p for p in output.rglob("*") if p.is_file() and "tensorboard" not in p.parts):
        name = str(path.relative_to(output))
        contents[name] = None
        if path.suffix == ".pth" or path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            contents[name] = {k: v.numpy().tobytes() for k, v in state.get("model", state).items()}
        elif (
            path.suffix in (".npz", ".npy", ".json", ".png")
            and path.name != "s.json"
            and "state" not in path.parts
        ):
            # The recorded command contains the path of the output.
            contents[name] = path.read_bytes().replace(str(output).encode(), b"OUTPUT")
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            contents[name] = [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
    return contents | {f"{path.relative_to(output)}/": None for path in output.rglob("*") if path.is_dir()}


def try_all(scenario: str, points: list[int]) -> dict:
    """Kill a scenario at each point, resume it, and return how it differs from an uninterrupted run."""
    work, whole = SCENARIOS[scenario], Path(f"{scenario}-whole")
    status, count, text = attempt(work, whole)
    assert status == 0, text
    expected, wrong = content(whole), {}
    tries = [(n, 0) for n in (range(1, count + 1) if points == [0] else points)]
    tries += [(0, size) for size in (1, 5_000, 100_000)] if points == [0] else []
    for stop_at, largest in tries:
        output, name = Path(f"{scenario}-cut"), f"{scenario} {stop_at} {largest}"
        before, after = attempt(work, output, stop_at, largest), attempt(work, output)
        contents = content(output)
        if before[0] not in (STOPPED, -signal.SIGXFSZ) and not largest:  # all files may be below the limit
            wrong[name] = f"was not stopped: {before}"
        elif after[0]:
            wrong[name] = after[2]
        elif contents != expected:
            names = [k for k in {**contents, **expected} if contents.get(k, 0) != expected.get(k, 0)]
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
