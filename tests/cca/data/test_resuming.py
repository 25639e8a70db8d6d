"""A run goes on with the data that it began with, wherever that lies now, and with no other."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from specimens import weights

import train_llamagen_cca
import train_var_cca
from models.errors import UserError
from scripts import extract_codes


def train(family, data, *options, output="run"):
    command = {"var": train_var_cca, "llamagen": train_llamagen_cca}[family]
    option = {"var": "--data", "llamagen": "--codes"}[family]
    command.main([*weights(family), option, data, "--max-steps", "1", "--output", output, *options])
    return json.loads(Path(output, "config.json").read_text())


def make_folder(path, names):
    for i, name in enumerate(names):
        for j in range(4):
            (path / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 30 * i + j).save(path / name / f"{j}.png")


def reverse(path):
    with np.load(path) as file:
        arrays = {name: file[name][::-1] for name in file.files}
    np.savez(path, **arrays)


def test_npz_may_move_but_not_change(disk):
    train("var", "few.npz")
    (disk / "few.npz").rename(disk / "moved.npz")
    train("var", "moved.npz")
    reverse(disk / "moved.npz")
    with pytest.raises(UserError, match="data_sha256"):
        train("var", "moved.npz")


def test_folder_may_move_but_not_change(disk):
    make_folder(disk / "data", ("3", "1"))
    config = train("var", "data")
    assert config["data"] == {"path": "data", "classes": {"1": 1, "3": 3}}
    (disk / "data").rename(disk / "moved")
    train("var", "moved")
    (disk / "classes.json").write_text('{"1": 2, "3": 3}')
    with pytest.raises(UserError, match="data_sha256"):
        train("var", "moved", "--classes-from", "classes.json")
    (disk / "moved" / "1").rename(disk / "moved" / "0")
    with pytest.raises(UserError, match="data_sha256"):
        train("var", "moved")


def test_codes_may_move_but_not_change(disk):
    train("llamagen", "codes")
    (disk / "codes").rename(disk / "moved")
    train("llamagen", "moved")
    codes = np.load(disk / "moved" / "codes.npy")
    np.save(disk / "moved" / "codes.npy", codes[::-1])
    with pytest.raises(UserError, match="data_sha256"):
        train("llamagen", "moved")


def extract(data, *options):
    tokenizer = ["--tokenizer-weights", "specimen-llamagen-tokenizer.safetensors"]
    with torch.no_grad():
        extract_codes.main(
            ["--model", "specimen-llamagen", *tokenizer, "--data", data, "--output", "new", *options]
        )


def test_extraction_does_not_go_on_with_other_images(disk, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(extract_codes.Extraction, "finish", lambda self: None)
        extract("few.npz")
    shutil.copy("few.npz", "other.npz")
    reverse(disk / "other.npz")
    with pytest.raises(UserError, match="unfinished run with data_sha256"):
        extract("other.npz")
    (disk / "few.npz").rename(disk / "moved.npz")
    extract("moved.npz")
    assert len(np.load(disk / "new" / "codes.npy")) == 64


def test_classes_of_extracted_codes_are_told(disk):
    make_folder(disk / "data", ("3", "1"))
    extract("data")
    header = json.loads((disk / "new" / "header.json").read_text())
    assert header["classes"] == {"1": 1, "3": 3} and len(header["data_sha256"]) == 64
    assert np.load(disk / "new" / "labels.npy").tolist() == [1] * 4 + [3] * 4
    train("llamagen", "new")  # its tokenizer is the model's


@pytest.mark.parametrize("options", [["--batch-size", "1"], []])
def test_missing_negatives_are_said(disk, capsys, options):
    with np.load("few.npz") as file:
        np.savez("one.npz", arr_0=file["arr_0"], arr_1=np.zeros(len(file["arr_0"]), np.int64))
    data = "few.npz" if options else "one.npz"
    train("var", data, *options)
    said = capsys.readouterr().err
    assert said.count("without negatives") == 1 and "note: " in said
    capsys.readouterr()
    train("var", "few.npz", output="usual")
    assert "without negatives" not in capsys.readouterr().err
