"""The setup that all scripts share, with a fake Python that prints its arguments."""

import os
import shutil
import subprocess
import sys

import pytest
from commands import ROOT

# It checks requirements with the real Python, creates .venv with a copy of itself, and prints its arguments.
PYTHON = f"""#!/bin/sh
[ "$1" != - ] || exec {sys.executable} "$@"
echo "python $*"
[ "$2" != venv ] || {{ mkdir -p .venv/bin && cp "$0" .venv/bin/python; }}
"""


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a script in a copy of scripts/, and returns what it printed."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(PYTHON)
    (tmp_path / "bin/python3").chmod(0o755)

    def run(script, *options, requirements="numpy"):
        (tmp_path / "requirements.txt").write_text(requirements)
        (tmp_path / "more.txt").write_text("torch>=2")
        path = f"{tmp_path / 'bin'}:{os.defpath}"
        command = ["bash", str(tmp_path / "scripts" / script), *options]
        return subprocess.run(command, env={"PATH": path}, check=True, capture_output=True, text=True).stdout

    return run


@pytest.mark.parametrize("script", ["quickstart.sh", "reproduce_var.sh"])
def test_help_needs_no_python(script, run, tmp_path):
    (tmp_path / "bin/python3").write_text("#!/bin/sh\nexit 1")
    printed = run(script, "--mini", "--help", requirements="nothing-of-this-name")
    assert "--num-samples N" in printed and "installing" not in printed and not (tmp_path / ".venv").exists()
    assert '"""' not in printed and "import" not in printed


def test_active_environment_is_used(run, tmp_path):
    printed = run("reproduce_var.sh", "--mini", requirements="-r more.txt\nnumpy>=1.9\n")
    assert printed == "python -m scripts.reproduce var-tables --mini\n"
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("requirements", ["numpy>=99", "no-such-package", "-r more.txt\ntorch>=99"])
def test_installation_is_announced(run, requirements):
    lines = run("reproduce_var.sh", requirements=requirements).splitlines()
    assert "lacks some of requirements.txt: installing it into" in lines[-4]
    assert lines[-3:] == [
        "python -m venv .venv",
        "python -m pip install --quiet --disable-pip-version-check -r requirements.txt",
        "python -m scripts.reproduce var-tables",
    ]
