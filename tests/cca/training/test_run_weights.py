"""A run, its model file and its checkpoints carry the resolution, tokenizer and classes of the run."""

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
    """Write three class folders and return the options for them; the folder "7" is named after its class."""
    monkeypatch.chdir(tmp_path)
    for name in ("my_dog", "tabby", "7"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 36), (30 * i, 90, 200)).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "my.json").write_text('{"tabby": 0, "my_dog": 1, "7": 7}')
    return ["photos", "--classes-from", "my.json"]


def read_class_names(model, weights):
    files = find_files(model, weights)
    return class_names(files.config.get("data"), 10)


def test_class_names_of_run(photos, tmp_path):
    train_var_cca.main(
        ["--model", "var-mini", "--data", *photos, *SHORT, "--sample-every", "1", "--output", "run"]
    )
    blank = np.zeros((12, 32, 32, 3), np.uint8)  # 4 images of each of the three trained classes
    assert Image.open("run/samples/step-000001.png").size == draw_grid(blank, 3).size
    for weights in ("run", "run/model.pth", "run/state/step-1"):
        assert read_class_names("var-mini", weights)[:3] == ["tabby", "my_dog", "Pullover"]
        assert read_class_names("var-mini", weights)[7] == "Sneaker"
    assert read_class_names("var-mini", "base")[:2] == ["T-shirt", "Trouser"]
    options = ["--classes", "0,1", "--num-samples", "4", "--output", "s.npz", "--grid", "g.png"]
    sample.main(["--model", "var-mini", "--weights", "run", *options])
    (images,) = NpzImages(tmp_path / "s.npz").batches(slice(0, 4), 4)
    expected = draw_grid(images, 2, ["tabby", "my_dog"] * 2)
    assert np.array_equal(np.asarray(Image.open("g.png")), np.asarray(expected))
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: is damaged"):
        read_class_names("var-mini", "run")


def test_codes_pass_on_class_names(photos, tmp_path):
    extract_codes.main(["--model", "llamagen-mini", "--data", *photos, "--output", "codes"])
    train = ["--model", "llamagen-mini", "--codes", "codes", *SHORT, "--output", "run"]
    train_llamagen_cca.main(train)
    assert read_class_names("llamagen-mini", "run")[:3] == ["tabby", "my_dog", "Pullover"]
    header = tmp_path / "codes" / "header.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"classes": ["tabby"]}))
    train_llamagen_cca.main([*train[:-1], "other"])
    assert read_class_names("llamagen-mini", "other")[:2] == ["T-shirt", "Trouser"]


OWN, OTHER = "own.safetensors", "specimen-var-tokenizer.safetensors"
SOURCES = [
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


def sample_images(output, weights, *options):
    """Sample from specimen-var and return images and classes.

    The tokenizer is that of the run unless ``options`` contain ``--tokenizer-weights``.
    """
    fixed = ["--model", "specimen-var", "--weights", weights, "--num-samples", "6", "--output", output]
    sample.main([*fixed, *options])
    with np.load(output) as content:
        return content["arr_0"], content["arr_1"]


def assert_refused(message, weights, *options):
    with pytest.raises(UserError, match=message) as caught:
        sample_images("refused.npz", weights, *options)
    assert "\n" not in str(caught.value) and not list(Path().glob("*refused*"))


@pytest.fixture
def run(disk):
    """Folder of a run on images of classes 1 and 3 with the user's own tokenizer (scaled weights)."""
    weights = load_file(OTHER)
    save_file({k: 1.5 * v if v.is_floating_point() else v for k, v in weights.items()}, OWN)
    with np.load("images.npz") as content:
        kept = np.flatnonzero(np.isin(content["arr_1"], (1, 3)))
        np.savez("two.npz", arr_0=content["arr_0"][kept], arr_1=content["arr_1"][kept])
    own = ["--weights", "specimen-var.safetensors", "--tokenizer-weights", OWN]
    train(*own, "--ema", "0.5", "--save-every", "1", "--keep-states", "2")
    return disk / "run"


def are_equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_tokenizer_of_run_is_used(run):
    (run.parent / "elsewhere").mkdir()
    for source in SOURCES:
        files = find_files("specimen-var", source)
        assert files.tokenizer_file.sha256 == file_sha256(Path(OWN)), source
        assert files.image_size == 8 and files.config["data"]["labels"] == [1, 3]
    expected = sample_images("taken.npz", "run")
    assert are_equal(expected, sample_images("given.npz", "run", "--tokenizer-weights", OWN))
    # Without its config.json, a model file has all classes and the tokenizer of the option.
    shutil.copy("run/model.pth", "elsewhere")
    away = ["elsewhere/model.pth", "--tokenizer-weights"]
    assert are_equal(expected, sample_images("away.npz", *away, OWN, "--classes", "1,3"))
    other, classes = sample_images("other.npz", *away, OTHER)
    assert not np.array_equal(other, expected[0]) and classes.tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("source", SOURCES)
def test_options_that_contradict_run_are_refused(run, source):
    sha256 = file_sha256(Path(OWN))
    assert_refused(
        f"^--tokenizer-weights: {OTHER} has another SHA-256 .*{sha256}", source, "--tokenizer-weights", OTHER
    )
    assert_refused("^--image-size: .* was trained at 8 pixels, not at 16", source, "--image-size", "16")
    with pytest.raises(UserError, match="^--weights: .* is a run of specimen-var, not of var-mini"):
        find_files("var-mini", source)


def test_moved_tokenizer_of_run(run):
    sha256, expected = file_sha256(Path(OWN)), sample_images("taken.npz", "run")
    Path(OWN).rename("moved.safetensors")
    assert_refused(f"^--tokenizer-weights: .*{OWN}: no such file.*{sha256}", "run")
    assert_refused(
        f"^--tokenizer-weights: nowhere: no such file.*{sha256}", "run", "--tokenizer-weights", "nowhere"
    )
    assert_refused(
        f"^--tokenizer-weights: {OTHER} has another SHA-256 .*{sha256}", "run", "--tokenizer-weights", OTHER
    )
    assert are_equal(expected, sample_images("moved.npz", "run", "--tokenizer-weights", "moved.safetensors"))
    shutil.copy(OTHER, OWN)  # another file with the same name
    assert_refused(f"has another SHA-256 .*{sha256}", "run")


def test_classes_of_run_are_default(run, capsys):
    assert sample_images("own.npz", "run")[1].tolist() == [1, 3] * 3
    assert "note: --classes is 1,3" in capsys.readouterr().out
    assert sample_images("all.npz", "run", "--classes", "all")[1].tolist() == [0, 1, 2, 3, 0, 1]
    assert sample_images("two-of.npz", "run", "--classes", "0,2")[1].tolist() == [0, 2] * 3


def test_load_model_accepts_runs_and_checkpoints(run):
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
    for missing in ("run/state/step-9", "run/state/step-9:ema", "nowhere:ema"):
        with pytest.raises(UserError, match=f"^--weights: {missing}"):
            load_model("specimen-var", missing)


@pytest.mark.parametrize("source", ["run", "run/state/step-1:ema"])
def test_training_from_run_uses_its_tokenizer(run, source):
    """The new run uses the tokenizer of the first run and records it. Another tokenizer is refused."""
    train("--weights", source, output="next")
    config = json.loads(Path("next/config.json").read_text())
    assert config["options"]["tokenizer_sha256"] == file_sha256(Path(OWN))
    assert config["options"]["weights"] == source
    assert find_files("specimen-var", "next").tokenizer_file.sha256 == file_sha256(Path(OWN))
    with pytest.raises(UserError, match="another SHA-256"):
        train("--weights", source, "--tokenizer-weights", OTHER, output="refused")
    assert not Path("refused").exists()


def test_training_starts_from_weights_of_checkpoint(run):
    """With a learning rate of 0, the new run exports the weights that it started from."""
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
def test_config_of_another_program_is_ignored(run, content):
    """The weights beside a config.json of another program are an ordinary file."""
    Path("foreign").mkdir()
    shutil.copy("run/model.pth", "foreign")
    Path("foreign/config.json").write_text(json.dumps(content))
    assert find_files("specimen-var", "foreign/model.pth").config == {}
    images, classes = sample_images("foreign.npz", "foreign/model.pth", "--tokenizer-weights", OTHER)
    assert len(images) == 6 and classes.tolist() == [0, 1, 2, 3, 0, 1]
