"""Sampling, training and extraction are stopped between any two changes to the disk, and go on."""

import json
import subprocess
import sys

import pytest
from commands import ROOT, environment


def killed(tmp_path, *points):
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


def test_a_few_moments(tmp_path):
    """Early, in the middle, and among the last changes."""
    killed(tmp_path, "sampling=5,16,29", "extraction=6,22", "training=60")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["sampling", "training", "training_on_codes", "extraction"])
def test_every_moment(scenario, tmp_path):
    (found,) = killed(tmp_path, f"{scenario}=0")
    assert found["tries"] == found["events"] + 3 > 20
