"""Extraction of codes: the command, resuming, full disks and damaged parts."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from commands import after_plan, content, run
from limits import largest_file
from made_data import make_image_folder
from specimens import extract

from cca.cli.parts import Parts
from models.base import ARImageModel
from models.utils.errors import UserError
from scripts import extract_codes


def test_extraction_from_folder(tmp_path, capsys):
    """Codes do not depend on the number of data-loading workers. With two ranks, nearly all are equal."""
    make_image_folder(tmp_path / "data", 60)
    common = ["--model", "llamagen-mini", "--data", str(tmp_path / "data"), "--output"]
    for name, workers in (("one", "0"), ("workers", "2")):
        with torch.no_grad():
            extract_codes.main([*common, str(tmp_path / name), "--workers", workers])
    assert content(tmp_path / "one") == content(tmp_path / "workers")
    run("-m", "scripts.extract_codes", *common, tmp_path / "two", "--workers", 1, processes=2)
    one, two = (np.load(tmp_path / name / "codes.npy") for name in ("one", "two"))
    assert one.shape == (60, 10, 64) and (one != two).mean() < 1e-3
    header, other = (json.loads((tmp_path / name / "header.json").read_text()) for name in ("one", "two"))
    assert header == other and header["crop_range"] == 1.1  # one rank computes the fingerprint of the data
    assert header["classes"] == {f"class{i}": i for i in range(10)} and len(header["data_sha256"]) == 64
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["codes.npy", "header.json", "labels.npy"]
    labels = np.load(tmp_path / "one" / "labels.npy")
    assert len(labels) == 60 and (np.diff(labels) >= 0).all()
    extract_codes.main([*common, str(tmp_path / "one")])
    assert "is finished already, with these options; nothing is left to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds finished codes with crop_range 1.1 instead of 1.05"):
        extract_codes.main([*common, str(tmp_path / "one"), "--crop-range", "1.05"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(extract_codes, "CHUNK", 256)


def test_resume_after_oom(disk, monkeypatch):
    """Finished chunks stay on disk, and the same command resumes."""
    original, calls = ARImageModel.encode, []

    def fail_once(model, images):
        calls.append(len(images))
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return original(model, images)

    monkeypatch.setattr(ARImageModel, "encode", fail_once)
    with pytest.raises(UserError, match=r"^--model: the tokenizer of specimen-llamagen does not fit in"):
        extract("new")
    extract("new")
    assert sum(calls[4:]) == 1100 - 256  # one chunk was finished
    extract("whole")
    assert content(disk / "new") == content(disk / "whole")


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT] * 2, [signal.SIGHUP]], ids=str)
def test_signal_keeps_finished_chunks(signals, disk, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        write = Parts.write

        def write_and_signal(self, part, rows):
            write(self, part, rows)
            for number in signals if part.start == 256 else ():
                os.kill(os.getpid(), number)

        patch.setattr(Parts, "write", write_and_signal)
        extract("new")
    line = "stopped; 512 of 1100 images are stored, repeat the command to resume\n"
    assert after_plan(capsys.readouterr().out) == line and not (disk / "new" / "header.json").exists()
    extract("new")
    extract("whole")
    assert content(disk / "new") == content(disk / "whole")
    assert sorted(content(disk / "new")) == ["codes.npy", "header.json", "labels.npy"]


def test_full_disk(disk, monkeypatch):
    with largest_file(300), pytest.raises(UserError, match="new/progress/.*: cannot be written .File too"):
        extract("new")
    assert not (disk / "new").exists()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000, "total": 10**12}))
        with pytest.raises(
            UserError, match="--output: new has 1 kB free, the run needs .* [kM]B, .* [kM]B more "
        ):
            extract("new")
    assert not (disk / "new").exists()


def test_other_codes_are_not_overwritten(disk):
    (disk / "new").mkdir()
    (disk / "new" / "codes.npy").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"codes\.npy exists, but no file beside it"):
        extract("new")
    assert content(disk / "new") == {"codes.npy": b"mine"}


def raise_disk_full(*_):
    raise UserError("no room")


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_damaged_part_is_written_again(damage, disk, monkeypatch):
    extract("whole")
    with monkeypatch.context() as patch:
        patch.setattr(extract_codes, "write_npy", raise_disk_full)
        with pytest.raises(UserError, match="no room"):
            extract("new")
    part = disk / "new" / "progress" / "00000256.npy"
    if damage == "missing":
        part.unlink()
    elif damage == "cut":
        part.write_bytes(part.read_bytes()[:500])
    else:
        np.save(part, np.zeros((3, 1, 16), np.uint16))
    extract("new")
    assert content(disk / "new") == content(disk / "whole")
