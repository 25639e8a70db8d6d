"""Output of commands: error messages of one line; closed, full or ASCII-only streams; no home folder."""

import os
import subprocess
import sys

import numpy as np
import pytest
from commands import REFERENCE, ROOT, environment
from made_data import bundled

from models.utils.errors import UserError, one_line

PRINTS = """
from cca.cli.main import run_command
from models.utils.errors import UserError
def main():
    for i in range(20_000):
        print("line \\u2013", i, flush=i % 100 == 0)
    open({done!r}, "w").close()
    if {wrong}:
        raise UserError("goes beyond 0 \\u2026 9")
run_command(main)
"""


def start(done, wrong=False, **options):
    code = PRINTS.format(done=str(done), wrong=wrong)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
def test_reader_closes_the_pipe(tmp_path, unbuffered):
    """As with ``| head -1``: the command writes nothing to stderr and finishes its work."""
    process = start(tmp_path / "done", stdout=subprocess.PIPE, env=environment(PYTHONUNBUFFERED=unbuffered))
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    process.stderr.close()
    assert (tmp_path / "done").exists()


def test_closed_stdout(tmp_path):
    command = f"exec {sys.executable} -m models >&-"
    result = subprocess.run(command, shell=True, cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
    assert result.returncode == 0 and result.stderr == b""


@pytest.mark.parametrize("closed", [pytest.param("2>&-", marks=pytest.mark.slow), ">&- 2>&-"])
def test_closed_stderr(tmp_path, closed):
    line = f"sample.py --model var-mini --num-samples 2 --output {tmp_path}/s.npz"
    result = subprocess.run(f"exec {sys.executable} {line} {closed}", shell=True, cwd=ROOT, env=environment())
    assert result.returncode == 0 and (tmp_path / "s.npz").exists()


NO_HOME = """
import pwd, sys
def missing(uid): raise KeyError(uid)
pwd.getpwuid = missing
import eval_fid
from cca.cli.main import run_command
run_command(eval_fid.main)
"""


@pytest.mark.parametrize("reference", [pytest.param(REFERENCE, marks=pytest.mark.slow), "imagenet256"])
def test_no_home(tmp_path, reference):
    """Without a home folder, the command warns that it cannot use a cache, or its error says what to set."""
    variables = environment(PYTHONPATH=str(ROOT))
    for name in ("HOME", "XDG_CACHE_HOME"):
        variables.pop(name, None)
    few = bundled(12, REFERENCE)
    np.savez(tmp_path / "few.npz", **few)
    reference = reference if reference == "imagenet256" else "few.npz"
    line = [
        sys.executable,
        "-c",
        NO_HOME,
        "--samples",
        "few.npz",
        "--reference",
        reference,
        "--features",
        "mini",
    ]
    result = subprocess.run(line, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert "Traceback" not in result.stderr and os.listdir(tmp_path) == ["few.npz"], result.stderr
    if reference == "few.npz":
        assert result.returncode == 0 and result.stderr.count("warning: ") == 1
    else:
        assert result.returncode == 2 and "set HOME" in result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_stdout(tmp_path):
    with open("/dev/full", "wb") as full:
        _, errors = start(tmp_path / "done", stdout=full, env=environment()).communicate()
    assert errors.decode() == "error: standard output cannot be written (No space left on device)\n"


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1:strict"},
    ],
)
def test_unencodable_characters_are_escaped(tmp_path, variables):
    process = start(tmp_path / "done", True, stdout=subprocess.PIPE, env=environment(**variables))
    output, errors = process.communicate()
    assert process.returncode == 2 and errors.decode() == "error: goes beyond 0 \\u2026 9\n"
    assert output.startswith(b"line \\u2013 0\n") and output.count(b"\n") == 20_000


def test_unexpected_disk_error_is_one_line(tmp_path):
    path = str(tmp_path / ("x" * 300))
    code = f"from cca.cli.main import run_command; run_command(lambda: open({path!r}, 'w'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and "File name too long" in result.stderr


def test_one_line():
    assert one_line(UserError("a\nb.npz: no such file\n")) == r"a\nb.npz: no such file"
    assert one_line(UserError("\x1b[31mred\udcff … ü")) == r"\x1b[31mred\udcff … ü"
    # The message of an error that a data-loading worker passes on.
    error = "Caught UserError in worker 0.\nTraceback:\nmodels.utils.errors.UserError: --data: a\nb is bad\n"
    assert one_line(UserError(error)) == r"--data: a\nb is bad"
