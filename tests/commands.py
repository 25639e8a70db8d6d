"""Runs the commands as users do: real processes, alone or under torchrun with gloo."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAIN = "assets/fashion-mnist-train-10k.npz"
REFERENCE = "assets/fashion-mnist-test-10k.npz"


def command_line(arguments: list, processes: int = 1) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else []), *map(str, arguments)]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


def run(*arguments, processes: int = 1, **variables: str) -> subprocess.CompletedProcess:
    """Run to success; ``variables`` join the environment."""
    result = subprocess.run(
        command_line(arguments, processes),
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    own = [
        line
        for line in result.stderr.splitlines()
        if "Warning: " in line and str(ROOT) in line and ".venv" not in line
    ]
    assert not own, own
    return result


def expect_error(command, *parts, **options):
    result = subprocess.run(
        command_line(command), cwd=ROOT, env=environment(), capture_output=True, text=True, **options
    )
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert len(errors) == 1 and all(part in errors[0] for part in parts), result.stderr
