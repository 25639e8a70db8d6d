"""Helpers that run the commands as users do: in new processes, alone or under torchrun with gloo."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAIN = "assets/fashion-mnist-train-10k.npz"
REFERENCE = "assets/fashion-mnist-test-10k.npz"


def command_line(arguments: list, processes: int = 1) -> list[str]:
    """Return the command line of a Python program, under torchrun if ``processes`` (ranks) is above 1."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else []), *map(str, arguments)]


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a command: one CPU thread, no GPU, and ``variables``."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


def call(arguments, processes: int = 1, **variables: str) -> subprocess.CompletedProcess:
    """Run a command and return its result, whether it failed or not. ``variables`` extend the environment."""
    line, variables = command_line(arguments, processes), environment(**variables)
    return subprocess.run(line, cwd=ROOT, env=variables, capture_output=True, text=True)


def run(*arguments, processes: int = 1, **variables: str) -> subprocess.CompletedProcess:
    """Run a command and return its result. It must succeed without a Python warning from this project."""
    result = call(arguments, processes, **variables)
    assert result.returncode == 0, result.stderr
    own = [
        line
        for line in result.stderr.splitlines()
        if "Warning: " in line and str(ROOT) in line and ".venv" not in line
    ]
    assert not own, own
    return result


def after_plan(printed: str) -> str:
    """Return what a command printed after its plan, which ends with an empty line."""
    return printed.partition("\n\n")[2]


def expect_error(command, *parts):
    """Run a command that must fail with a single error line, which contains all ``parts``."""
    result = call(command)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert len(errors) == 1 and all(part in errors[0] for part in parts), result.stderr


def content(folder: Path) -> dict[str, bytes]:
    """Return the content of each file in a folder, by its name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def free_port() -> int:
    """Return a TCP port that no process uses."""
    with socket.socket() as connection:
        connection.bind(("localhost", 0))
        return connection.getsockname()[1]


def start_processes(arguments: list, folders: list[Path], **variables: str) -> list[subprocess.Popen]:
    """Start one rank in each folder, as on nodes without a shared disk. ``finish`` waits for them."""
    rendezvous = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(len(folders)),
    }
    return [
        start(command_line(arguments), folder, **rendezvous, **variables, RANK=str(rank))
        for rank, folder in enumerate(folders)
    ]


def start_agents(arguments: list, folders: list[Path]) -> list[subprocess.Popen]:
    """Start one torchrun with one rank in each folder, as on several nodes."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "1"]
    nodes = ["--nnodes", len(folders), "--nproc_per_node", 1, *rendezvous]
    line = command_line(["-m", "torch.distributed.run", *nodes, *arguments])
    return [start(line, folder) for folder in folders]


def start(line: list[str], folder: Path = ROOT, **variables: str) -> subprocess.Popen:
    """Start a process in a new session: a signal to its process group does not reach the tests."""
    variables = environment(PYTHONPATH=str(ROOT), **variables)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=folder, env=variables, start_new_session=True, **pipes)


def wait_until(process: subprocess.Popen, ready: Callable[[], bool]) -> None:
    """Wait until ``ready`` returns True or the process has ended."""
    while process.poll() is None and not ready():
        time.sleep(0.01)


def lines(path: Path) -> list[str]:
    """Return the lines of a file, or an empty list if it does not exist yet."""
    return path.read_text().splitlines() if path.exists() else []


def metrics(run: Path) -> list[dict]:
    """Return the metrics that a run logged, one dict per step."""
    return [json.loads(line) for line in lines(run / "metrics.jsonl")]


def finish(processes: list[subprocess.Popen], timeout: int = 300) -> list[tuple[int, str, str]]:
    """Wait for all processes and return exit status, stdout and stderr of each. Kill those that still run."""
    try:
        return [(process.wait(timeout), *process.communicate(timeout=timeout)) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
