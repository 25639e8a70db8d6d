"""The output of a command: where it may be written, its lock, and outputs in another format."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest
from commands import ROOT

from cca.cli.output import Output
from models.utils.errors import UserError

HOLD = """
import os, sys, time
from pathlib import Path
from cca.cli.output import Output
with Output(Path(sys.argv[1])).lock():
    if os.fork() == 0:  # as a data loader's process
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def test_folder_without_write_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    with pytest.raises(UserError, match="--output: .*no permission"):
        Output(tmp_path / "s.npz").check_place()


def test_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "s.npz"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    )
    assert holder.stdout.readline() == b"held\n"
    with (
        pytest.raises(UserError, match=f"s.npz is being written by process {holder.pid} on "),
        Output(path).lock(),
    ):
        pass
    assert os.listdir(tmp_path) == [".s.npz.lock"]
    holder.kill()
    holder.wait()
    with Output(path).lock():  # the child still runs, but does not hold the lock
        assert os.listdir(tmp_path) == [".s.npz.lock"]
    os.killpg(holder.pid, 9)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("folder", [False, True])
def test_empty_new_folders_are_removed(folder, tmp_path):
    with pytest.raises(UserError, match="refused"), Output(tmp_path / "a" / "b", folder).lock():
        raise UserError("refused")
    assert not os.listdir(tmp_path)
    with Output(tmp_path / "a" / "b", folder).lock():
        (tmp_path / "a" / "kept").touch()
    assert os.listdir(tmp_path / "a") == ["kept"]


def test_file_system_without_locks_warns(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with Output(tmp_path / "s.npz").lock():
        pass
    assert "warning: --output: locks do not work" in capsys.readouterr().err


@pytest.mark.parametrize("format_key", ["", '"format": 2, ', '"format": "1", '])
@pytest.mark.parametrize("kind", ["samples", "described samples", "codes", "finished codes", "run"])
def test_other_format_or_kind_is_refused(kind, format_key, tmp_path):
    output, marker = {
        "samples": (Output.npz(tmp_path / "s.npz", "samples"), "s.npz.parts/options.json"),
        "described samples": (Output.npz(tmp_path / "s.npz", "samples"), "s.json"),
        "codes": (Output.codes(tmp_path), "progress/header.json"),
        "finished codes": (Output.codes(tmp_path), "header.json"),
        "run": (Output.run(tmp_path, "model.pt"), "config.json"),
    }[kind]
    path = tmp_path / marker
    path.parent.mkdir(exist_ok=True)
    content = f'"kind": "{output.noun}", "options": {{"seed": 0}}}}'
    path.write_text(f"{{{format_key}{content}")
    with pytest.raises(UserError, match=f"{path.name}: holds format"):
        output.look()
    path.write_text('{"format": 1, "kind": "something else", "options": {"seed": 0}}')
    with pytest.raises(UserError, match=f"{path.name} describes 'something else', not {output.noun}"):
        output.look()
    path.write_text('{"format": 1, ' + content)
    assert output.look().options in ({}, {"seed": 0})  # {} for a description without its samples
