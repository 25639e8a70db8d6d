"""Unreadable images: one limit for training and extraction, and files that are repaired later."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, call, run
from made_data import make_picture

import train_var_cca
from models import UserError
from scripts import extract_codes

IMAGES = 24  # of which one may be unreadable


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Folder of 24 images in 2 classes; each image has its own grey value."""
    monkeypatch.chdir(tmp_path)
    for i in range(IMAGES):
        make_picture(image_path(i), 10 * i)
    return tmp_path / "data"


def image_path(i):
    return Path("data", str(i // 12), f"{i:02d}.png")


def repair(i):
    make_picture(image_path(i), 10 * i)


def damage(*indices):
    for i in indices:
        image_path(i).write_bytes(image_path(i).read_bytes()[:40])


TRAIN = ["train_var_cca.py", "--model", "var-mini", "--data", "data", "--output", "run"]
TRAIN += ["--batch-size", "8", "--max-steps", "6", "--save-every", "2"]


def train():
    train_var_cca.main(TRAIN[1:])


def extract(output="codes"):
    common = ["--model", "llamagen-mini", "--data", "data", "--batch-size", "80"]
    extract_codes.main([*common, "--output", output])


def read_unreadable(record):
    return json.loads(Path(record).read_text()).get("unreadable", {})


def test_training_tolerates_one_unreadable_image(data, capsys):
    damage(3)
    train()
    assert read_unreadable("run/config.json").keys() == {"0/03.png"}
    assert capsys.readouterr().err.count("data/0/03.png") == 1
    for change in (repair, damage):
        change(3)
        train()
        assert "is finished already" in capsys.readouterr().out
    image_path(3).unlink()
    with pytest.raises(UserError, match=r"data/0/03.png was removed after it could not be read"):
        train()


def test_training_resumes_after_repair(data):
    damage(3, 20)
    with pytest.raises(UserError, match="--data: 2 of 24 images cannot be read, .*data/0/03.png"):
        train()
    steps = sorted(path.name for path in Path("run/state").iterdir())
    assert len(steps) == 1 and steps[0] in ("step-1", "step-2", "step-3")  # saved before the error
    assert read_unreadable("run/config.json").keys() == {"0/03.png", "1/20.png"}
    with pytest.raises(UserError, match="2 of 24 images cannot be read"):  # before the next step
        train()
    assert sorted(path.name for path in Path("run/state").iterdir()) == steps
    content = image_path(7).read_bytes()
    image_path(7).write_bytes(content + b"longer")
    repair(20)
    with pytest.raises(UserError, match="data_sha256"):  # only unreadable files may change
        train()
    image_path(7).write_bytes(content)
    train()
    repair(3)
    train()
    assert Path("run/model.pth").exists() and len(read_unreadable("run/config.json")) == 2


def test_file_damaged_during_run_can_be_restored(data, monkeypatch):
    """The fingerprint is computed before the file is damaged, so restoring the file does not change it."""
    from cca.training.unreadable import Unreadable

    begin = Unreadable.__init__
    monkeypatch.setattr(Unreadable, "__init__", lambda *a: (damage(3), begin(*a))[1])
    train()
    monkeypatch.undo()
    monkeypatch.chdir(data.parent)
    assert read_unreadable("run/config.json").keys() == {"0/03.png"}
    repair(3)
    train()


def test_two_ranks_count_unreadable_image_once(data):
    damage(3)
    result = run(Path(train_var_cca.__file__), *absolute_paths(TRAIN[1:], data), processes=2)
    assert result.stderr.count("0/03.png") == 1
    damage(20)
    result = call([Path(train_var_cca.__file__), *absolute_paths(TRAIN[1:], data, "other")], processes=2)
    assert result.returncode and "2 of 24 images cannot be read" in result.stderr, result.stderr
    assert set(read_unreadable(data.parent / "other" / "config.json")) == {"0/03.png", "1/20.png"}


def absolute_paths(arguments, data, output="run"):
    return [{"data": data, "run": data.parent / output}.get(text, text) for text in arguments]


def test_extraction_resumes_after_repair(data, monkeypatch, capsys):
    monkeypatch.setattr(extract_codes, "CHUNK", 8)
    extract("whole")
    damage(3, 20)
    with pytest.raises(UserError, match="--data: 2 of 24 images cannot be read"):
        extract()
    assert len(list(Path("codes/progress").glob("*.npy"))) == 2  # saved before the error
    with pytest.raises(UserError, match="2 of 24 images cannot be read"):
        extract()
    image_path(20).rename("kept.png")
    with pytest.raises(UserError, match=r"data/1/20.png was removed after it could not be read"):
        extract()
    Path("kept.png").rename(image_path(20))
    repair(3)
    repair(20)
    extract()
    notes = read_unreadable("codes/header.json")
    assert {key: note["replaced"] for key, note in notes.items()} == {"0/03.png": True, "1/20.png": False}
    same = [np.array_equal(*pair) for pair in zip(np.load("codes/codes.npy"), np.load("whole/codes.npy"))]
    assert [i for i in range(IMAGES) if not same[i]] == [3]  # codes stored earlier keep the replacement
    capsys.readouterr()
    for change in (repair, damage):
        change(3)
        extract()
        assert "is finished already" in capsys.readouterr().out


@pytest.mark.slow
def test_extraction_counts_images_of_all_ranks(data):
    """Each rank reads one of the two unreadable files."""
    script = data.parent / "script.py"
    script.write_text(
        "from cca.cli.main import run_command\nfrom scripts import extract_codes as e\n"
        "e.CHUNK = 4\nrun_command(e.main)\n"
    )
    line = [script, "--model", "llamagen-mini", "--data", data, "--batch-size", 40]
    damage(7, 16)
    common = {"processes": 2, "PYTHONPATH": str(ROOT)}
    result = call([*line, "--output", data.parent / "codes"], **common)
    assert result.returncode and "2 of 24 images cannot be read" in result.stderr, result.stderr
    assert result.stderr.count("unreadable, replaced") == 2
    repair(16)
    run(*line, "--output", data.parent / "codes", **common)
    notes = read_unreadable("codes/header.json")
    assert {key: note["replaced"] for key, note in notes.items()} == {"0/07.png": True, "1/16.png": False}
    assert sorted(path.name for path in Path("codes").iterdir()) == ["codes.npy", "header.json", "labels.npy"]


def test_failed_extraction_without_codes_leaves_no_folder(data):
    damage(3, 5)
    with pytest.raises(UserError, match="2 of 24 images cannot be read"):
        extract()
    assert not Path("codes").exists()
    repair(3)
    extract()
    assert read_unreadable("codes/header.json").keys() == {"0/05.png"}
