"""Sampling, training and extraction are killed between any two changes on disk, and resume."""

import json
import subprocess
import sys

import pytest
from commands import ROOT, environment


def kill_and_resume(tmp_path, *points):
    """Run killing.py, assert that all scenarios resumed, and return its result for each scenario."""
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "killing.py", *points],
        cwd=tmp_path,
        env=environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [scenario["wrong"] for scenario in found] == [{}] * len(points)
    return found


def test_kills_at_some_writes(tmp_path):
    """Kill early, in the middle, and shortly before the end."""
    kill_and_resume(tmp_path, "sampling=5,16,29", "extraction=6,22", "training=60")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["sampling", "training", "training_on_codes", "extraction"])
def test_kills_at_every_write(scenario, tmp_path):
    (found,) = kill_and_resume(tmp_path, f"{scenario}=0")
    assert found["tries"] == found["events"] + 3 > 20
