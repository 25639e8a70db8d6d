"""Weights of a run: its size, tokenizer and classes are taken wherever it, its file or a state is given."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
import train_llamagen_cca
import train_var_cca
from cca.data.image_sets import NpzImages
from cca.data.labels import class_names
from cca.sampling.grid import draw_grid
from models import UserError, find_files, load_model
from models.utils.files import file_sha256
from scripts import extract_codes

SHORT = ["--batch-size", "4", "--max-steps", "1"]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Two class folders of the user's own, and one whose name is its class."""
    monkeypatch.chdir(tmp_path)
    for name in ("my_dog", "tabby", "7"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 36), (30 * i, 90, 200)).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "my.json").write_text('{"tabby": 0, "my_dog": 1, "7": 7}')
    return ["photos", "--classes-from", "my.json"]


def names(model, weights):
    files = find_files(model, weights)
    return class_names(files.config.get("data"), 10)


def test_own_classes_keep_their_names(photos, tmp_path):
    train_var_cca.main(
        ["--model", "var-mini", "--data", *photos, *SHORT, "--sample-every", "1", "--output", "run"]
    )
    blank = np.zeros((12, 32, 32, 3), np.uint8)  # 4 images of each class that is trained
    assert Image.open("run/samples/step-000001.png").size == draw_grid(blank, 3).size
    for weights in ("run", "run/model.pth", "run/state/step-1"):
        assert names("var-mini", weights)[:3] == ["tabby", "my_dog", "Pullover"]
        assert names("var-mini", weights)[7] == "Sneaker"
    assert names("var-mini", "base")[:2] == ["T-shirt", "Trouser"]
    made = ["--classes", "0,1", "--num-samples", "4", "--output", "s.npz", "--grid", "g.png"]
    sample.main(["--model", "var-mini", "--weights", "run", *made])
    (images,) = NpzImages(tmp_path / "s.npz").batches(slice(0, 4), 4)
    expected = draw_grid(images, 2, ["tabby", "my_dog"] * 2)
    assert np.array_equal(np.asarray(Image.open("g.png")), np.asarray(expected))
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: is damaged"):
        names("var-mini", "run")


def test_codes_hand_on_the_names(photos, tmp_path):
    extract_codes.main(["--model", "llamagen-mini", "--data", *photos, "--output", "codes"])
    train = ["--model", "llamagen-mini", "--codes", "codes", *SHORT, "--output", "run"]
    train_llamagen_cca.main(train)
    assert names("llamagen-mini", "run")[:3] == ["tabby", "my_dog", "Pullover"]
    header = tmp_path / "codes" / "header.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"classes": ["tabby"]}))
    train_llamagen_cca.main([*train[:-1], "other"])
    assert names("llamagen-mini", "other")[:2] == ["T-shirt", "Trouser"]


OWN, OTHER = "own.safetensors", "specimen-var-tokenizer.safetensors"
EVERY_WAY = [
    "run",
    "run:ema",
    "run/model.pth",
    "run/model_ema.pth",
    "run/state/step-2",
    "run/state/step-1:ema",
]


def train(*options, output="run"):
    fixed = ["--model", "specimen-var", "--data", "two.npz", *SHORT[:2], "--max-steps", "2"]
    train_var_cca.main([*fixed, *options, "--output", output])


def sampled(output, weights, *options):
    """Samples of the specimen, without the option of the tokenizer unless it is given: images and classes."""
    fixed = ["--model", "specimen-var", "--weights", weights, "--num-samples", "6", "--output", output]
    sample.main([*fixed, *options])
    with np.load(output) as content:
        return content["arr_0"], content["arr_1"]


def refused(message, weights, *options):
    with pytest.raises(UserError, match=message) as caught:
        sampled("refused.npz", weights, *options)
    assert "\n" not in str(caught.value) and not list(Path().glob("*refused*"))


@pytest.fixture
def run(disk):
    """A run on images of classes 1 and 3, whose tokenizer is the user's own; from scaled weights."""
    weights = load_file(OTHER)
    save_file({k: 1.5 * v if v.is_floating_point() else v for k, v in weights.items()}, OWN)
    with np.load("images.npz") as content:
        kept = np.flatnonzero(np.isin(content["arr_1"], (1, 3)))
        np.savez("two.npz", arr_0=content["arr_0"][kept], arr_1=content["arr_1"][kept])
    own = ["--weights", "specimen-var.safetensors", "--tokenizer-weights", OWN]
    train(*own, "--ema", "0.5", "--save-every", "1", "--keep-states", "2")
    return disk / "run"


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_tokenizer_of_a_run_is_taken(run):
    (run.parent / "elsewhere").mkdir()
    for way in EVERY_WAY:
        files = find_files("specimen-var", way)
        assert files.tokenizer_file.sha256 == file_sha256(Path(OWN)), way
        assert files.image_size == 8 and files.config["data"]["labels"] == [1, 3]
    taken = sampled("taken.npz", "run")
    assert equal(taken, sampled("given.npz", "run", "--tokenizer-weights", OWN))
    # A file away from its config.json is an ordinary one: all classes, and the tokenizer that is given.
    shutil.copy("run/model.pth", "elsewhere")
    away = ["elsewhere/model.pth", "--tokenizer-weights"]
    assert equal(taken, sampled("away.npz", *away, OWN, "--classes", "1,3"))
    other, classes = sampled("other.npz", *away, OTHER)
    assert not np.array_equal(other, taken[0]) and classes.tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("way", EVERY_WAY)
def test_what_the_run_was_not_trained_with_is_refused(run, way):
    sha256 = file_sha256(Path(OWN))
    refused(
        f"^--tokenizer-weights: {OTHER} has another SHA-256 .*{sha256}", way, "--tokenizer-weights", OTHER
    )
    refused("^--image-size: .* was trained at 8 pixels, not at 16", way, "--image-size", "16")
    with pytest.raises(UserError, match="^--weights: .* is a run of specimen-var, not of var-mini"):
        find_files("var-mini", way)


def test_a_tokenizer_that_is_gone(run):
    sha256, taken = file_sha256(Path(OWN)), sampled("taken.npz", "run")
    Path(OWN).rename("moved.safetensors")
    refused(f"^--tokenizer-weights: .*{OWN}: no such file.*{sha256}", "run")
    refused(f"^--tokenizer-weights: nowhere: no such file.*{sha256}", "run", "--tokenizer-weights", "nowhere")
    refused(
        f"^--tokenizer-weights: {OTHER} has another SHA-256 .*{sha256}", "run", "--tokenizer-weights", OTHER
    )
    assert equal(taken, sampled("moved.npz", "run", "--tokenizer-weights", "moved.safetensors"))
    shutil.copy(OTHER, OWN)  # another file of that name
    refused(f"has another SHA-256 .*{sha256}", "run")


def test_classes_of_a_run(run, capsys):
    assert sampled("own.npz", "run")[1].tolist() == [1, 3] * 3
    assert "note: --classes is 1,3" in capsys.readouterr().out
    assert sampled("all.npz", "run", "--classes", "all")[1].tolist() == [0, 1, 2, 3, 0, 1]
    assert sampled("two-of.npz", "run", "--classes", "0,2")[1].tolist() == [0, 2] * 3


def test_load_model_takes_every_way(run):
    def state(text):
        model = load_model("specimen-var", text)
        return {**model.transformer.state_dict(), **model.tokenizer.state_dict()}

    exported, average = state("run/model.pth"), state("run/model_ema.pth")
    assert any(not torch.equal(exported[key], average[key]) for key in exported)
    for text, expected in (
        ("run", exported), ("run/state/step-2", exported),
        ("run:ema", average), ("run/state/step-2:ema", average),
    ):  # fmt: skip
        found = state(text)
        assert all(torch.equal(found[key], expected[key]) for key in expected), text
    assert any(not torch.equal(state("run/state/step-1")[key], exported[key]) for key in exported)
    for gone in ("run/state/step-9", "run/state/step-9:ema", "nowhere:ema"):
        with pytest.raises(UserError, match=f"^--weights: {gone}"):
            load_model("specimen-var", gone)


@pytest.mark.parametrize("way", ["run", "run/state/step-1:ema"])
def test_training_from_a_run(run, way):
    """Its tokenizer comes along, also to the note of the new run; another is refused."""
    train("--weights", way, output="next")
    config = json.loads(Path("next/config.json").read_text())
    assert config["options"]["tokenizer_sha256"] == file_sha256(Path(OWN))
    assert config["options"]["weights"] == way
    assert find_files("specimen-var", "next").tokenizer_file.sha256 == file_sha256(Path(OWN))
    with pytest.raises(UserError, match="another SHA-256"):
        train("--weights", way, "--tokenizer-weights", OTHER, output="refused")
    assert not Path("refused").exists()


def test_training_starts_from_those_weights(run):
    """With a rate of 0 the new run exports what it began with."""
    train("--weights", "run/state/step-1:ema", "--lr", "0", output="next")
    start = load_model("specimen-var", "run/state/step-1:ema").transformer.state_dict()
    end = load_model("specimen-var", "next").transformer.state_dict()
    assert all(torch.equal(start[key], end[key]) for key in start)


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "gpt2", "image_size": 1024},
        {"format": 1, "model": "other"},
        {"format": 7, "options": {"model": "llamagen-b", "image_size": 384}},
    ],
)
def test_a_config_of_somebody_else(run, content):
    """It is ignored: the weights beside it are an ordinary file."""
    Path("foreign").mkdir()
    shutil.copy("run/model.pth", "foreign")
    Path("foreign/config.json").write_text(json.dumps(content))
    assert find_files("specimen-var", "foreign/model.pth").config == {}
    images, classes = sampled("foreign.npz", "foreign/model.pth", "--tokenizer-weights", OTHER)
    assert len(images) == 6 and classes.tolist() == [0, 1, 2, 3, 0, 1]
