"""A run resumes with the data it started with, which may have moved, and refuses other data."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_data import make_picture
from specimens import extract, weights

import train_llamagen_cca
import train_var_cca
from models.base import ARImageModel
from models.utils.errors import UserError
from scripts import extract_codes


def train(family, data, *options, output="run"):
    command = {"var": train_var_cca, "llamagen": train_llamagen_cca}[family]
    option = {"var": "--data", "llamagen": "--codes"}[family]
    command.main([*weights(family), option, data, "--max-steps", "1", "--output", output, *options])
    return json.loads(Path(output, "config.json").read_text())


def reverse(path):
    if path.is_dir():
        np.save(path / "codes.npy", np.load(path / "codes.npy")[::-1])
    else:
        with np.load(path) as file:
            np.savez(path, **{name: file[name][::-1] for name in file.files})


@pytest.mark.parametrize("family, data", [("var", "few.npz"), ("llamagen", "codes")])
def test_data_may_move_but_not_change(disk, family, data):
    train(family, data)
    (disk / data).rename(disk / f"moved-{data}")
    train(family, f"moved-{data}")
    reverse(disk / f"moved-{data}")
    with pytest.raises(UserError, match="data_sha256"):
        train(family, f"moved-{data}")


def test_folder_may_move_but_not_change(disk):
    for i in range(8):
        make_picture(disk / "data" / str(i % 2 * 2 + 1) / f"{i // 2}.png", grey=10 * i, size=(8, 8))
    assert train("var", "data")["data"] == {
        "path": "data", "classes": {"1": 1, "3": 3}, "labels": [1, 3]
    }  # fmt: skip
    (disk / "data").rename(disk / "moved")
    train("var", "moved")
    (disk / "classes.json").write_text('{"1": 2, "3": 3}')
    with pytest.raises(UserError, match="data_sha256"):
        train("var", "moved", "--classes-from", "classes.json")
    image = disk / "moved" / "1" / "0.png"
    content = image.read_bytes()
    image.write_bytes(content + b"longer")
    with pytest.raises(UserError, match="data_sha256"):
        train("var", "moved")
    image.write_bytes(content)
    train("var", "moved")
    second = disk / "moved" / "1" / "1.png"
    size = second.stat().st_size
    make_picture(second, grey=90, size=(8, 8))
    assert second.stat().st_size == size
    with pytest.raises(UserError, match="data_sha256"):
        train("var", "moved")
    make_picture(second, grey=20, size=(8, 8))
    with pytest.raises(UserError, match="exif_orientation False instead of True"):
        train("var", "moved", "--exif-orientation")
    train("var", "moved")
    (disk / "moved" / "1").rename(disk / "moved" / "0")
    with pytest.raises(UserError, match="data_sha256"):
        train("var", "moved")


def test_extraction_does_not_resume_with_other_images(disk, monkeypatch):
    encode, calls = ARImageModel.encode, []

    def interrupt(model, images):
        calls.append(images)
        if len(calls) == 2:  # the first part is stored
            raise KeyboardInterrupt
        return encode(model, images)

    monkeypatch.setattr(extract_codes, "CHUNK", 8)
    with monkeypatch.context() as patch:
        patch.setattr(ARImageModel, "encode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            extract("new", "few.npz")
    shutil.copy("few.npz", "other.npz")
    reverse(disk / "other.npz")
    with pytest.raises(UserError, match="unfinished run with data_sha256"):
        extract("new", "other.npz")
    (disk / "few.npz").rename(disk / "moved.npz")
    extract("new", "moved.npz")
    assert len(np.load(disk / "new" / "codes.npy")) == 64


@pytest.mark.parametrize("options", [["--batch-size", "1"], []])
def test_missing_negatives_are_reported(disk, capsys, options):
    with np.load("few.npz") as file:
        np.savez("one.npz", arr_0=file["arr_0"], arr_1=np.zeros(len(file["arr_0"]), np.int64))
    train("var", "few.npz" if options else "one.npz", *options)
    messages = capsys.readouterr().err
    assert messages.count("without negatives") == 1 and "note: " in messages
    train("var", "few.npz", output="usual")
    assert "without negatives" not in capsys.readouterr().err
