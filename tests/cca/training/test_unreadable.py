"""Images that cannot be read: one rule for training and extraction, and files that are mended later."""

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
    """A folder of 24 pictures in 2 classes, each with a grey of its own."""
    monkeypatch.chdir(tmp_path)
    for i in range(IMAGES):
        make_picture(picture(i), 10 * i)
    return tmp_path / "data"


def picture(i):
    return Path("data", str(i // 12), f"{i:02d}.png")


def mend(i):
    make_picture(picture(i), 10 * i)


def spoil(*indices):
    for i in indices:
        picture(i).write_bytes(picture(i).read_bytes()[:40])


TRAIN = ["train_var_cca.py", "--model", "var-mini", "--data", "data", "--output", "run"]
TRAIN += ["--batch-size", "8", "--max-steps", "6", "--save-every", "2"]


def train():
    train_var_cca.main(TRAIN[1:])


def extract(output="codes"):
    common = ["--model", "llamagen-mini", "--data", "data", "--batch-size", "80"]
    extract_codes.main([*common, "--output", output])


def unreadable(record):
    return json.loads(Path(record).read_text()).get("unreadable", {})


def test_training_bears_one_and_stops_at_two(data, capsys):
    spoil(3)
    train()
    assert unreadable("run/config.json").keys() == {"0/03.png"}
    assert capsys.readouterr().err.count("data/0/03.png") == 1
    for change in (mend, spoil):
        change(3)
        train()
        assert "is finished already" in capsys.readouterr().out
    picture(3).unlink()
    with pytest.raises(UserError, match=r"data/0/03.png was removed after it could not be read"):
        train()


def test_training_goes_on_when_files_are_mended(data):
    spoil(3, 20)
    with pytest.raises(UserError, match="--data: 2 of 24 images cannot be read, .*data/0/03.png"):
        train()
    steps = sorted(path.name for path in Path("run/state").iterdir())
    assert len(steps) == 1 and steps[0] in ("step-1", "step-2", "step-3")  # saved before it stopped
    assert unreadable("run/config.json").keys() == {"0/03.png", "1/20.png"}
    with pytest.raises(UserError, match="2 of 24 images cannot be read"):  # before another step is done
        train()
    assert sorted(path.name for path in Path("run/state").iterdir()) == steps
    content = picture(7).read_bytes()
    picture(7).write_bytes(content + b"longer")
    mend(20)
    with pytest.raises(UserError, match="data_sha256"):  # of no other file
        train()
    picture(7).write_bytes(content)
    train()
    mend(3)
    train()
    assert Path("run/model.pth").exists() and len(unreadable("run/config.json")) == 2


def test_what_the_fingerprint_saw_counts(data, monkeypatch):
    """A file that is spoilt while the run is under way, then put back as it was."""
    from cca.training.unreadable import Unreadable

    begin = Unreadable.__init__
    monkeypatch.setattr(Unreadable, "__init__", lambda *a: (spoil(3), begin(*a))[1])
    train()
    monkeypatch.undo()
    monkeypatch.chdir(data.parent)
    assert unreadable("run/config.json").keys() == {"0/03.png"}
    mend(3)
    train()


def test_two_ranks_count_a_file_once(data):
    """Three epochs of random order: both ranks meet it."""
    spoil(3)
    result = run(Path(train_var_cca.__file__), *absolute(TRAIN[1:], data), processes=2)
    assert result.stderr.count("0/03.png") == 1
    spoil(20)
    result = call([Path(train_var_cca.__file__), *absolute(TRAIN[1:], data, "other")], processes=2)
    assert result.returncode and "2 of 24 images cannot be read" in result.stderr, result.stderr
    assert set(unreadable(data.parent / "other" / "config.json")) == {"0/03.png", "1/20.png"}


def absolute(arguments, data, output="run"):
    return [{"data": data, "run": data.parent / output}.get(text, text) for text in arguments]


def test_extraction(data, monkeypatch, capsys):
    monkeypatch.setattr(extract_codes, "CHUNK", 8)
    extract("whole")
    spoil(3, 20)
    with pytest.raises(UserError, match="--data: 2 of 24 images cannot be read"):
        extract()
    assert len(list(Path("codes/progress").glob("*.npy"))) == 2  # saved before it stopped
    with pytest.raises(UserError, match="2 of 24 images cannot be read"):
        extract()
    picture(20).rename("kept.png")
    with pytest.raises(UserError, match=r"data/1/20.png was removed after it could not be read"):
        extract()
    Path("kept.png").rename(picture(20))
    mend(3)
    mend(20)
    extract()
    noted = unreadable("codes/header.json")
    assert {name: seen["replaced"] for name, seen in noted.items()} == {"0/03.png": True, "1/20.png": False}
    same = [np.array_equal(*pair) for pair in zip(np.load("codes/codes.npy"), np.load("whole/codes.npy"))]
    assert [i for i in range(IMAGES) if not same[i]] == [3]  # codes that were made keep the other image
    capsys.readouterr()
    for change in (mend, spoil):
        change(3)
        extract()
        assert "is finished already" in capsys.readouterr().out


@pytest.mark.slow
def test_extraction_counts_over_ranks(data):
    """Each rank meets one of the two files; the codes of three of the six parts are there before."""
    script = data.parent / "script.py"
    script.write_text(
        "from cca.cli.main import run_command\nfrom scripts import extract_codes as e\n"
        "e.CHUNK = 4\nrun_command(e.main)\n"
    )
    line = [script, "--model", "llamagen-mini", "--data", data, "--batch-size", 40]
    spoil(7, 16)
    common = {"processes": 2, "PYTHONPATH": str(ROOT)}
    result = call([*line, "--output", data.parent / "codes"], **common)
    assert result.returncode and "2 of 24 images cannot be read" in result.stderr, result.stderr
    assert result.stderr.count("unreadable, replaced") == 2
    mend(16)
    run(*line, "--output", data.parent / "codes", **common)
    noted = unreadable("codes/header.json")
    assert {name: seen["replaced"] for name, seen in noted.items()} == {"0/07.png": True, "1/16.png": False}
    assert sorted(path.name for path in Path("codes").iterdir()) == ["codes.npy", "header.json", "labels.npy"]


def test_nothing_is_left_where_nothing_was_made(data):
    spoil(3, 5)
    with pytest.raises(UserError, match="2 of 24 images cannot be read"):
        extract()
    assert not Path("codes").exists()
    mend(3)
    extract()
    assert unreadable("codes/header.json").keys() == {"0/05.png"}
