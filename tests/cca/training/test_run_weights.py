"""Weights that are sampled from: what a run says of its classes."""

import json

import numpy as np
import pytest
from PIL import Image

import sample
import train_llamagen_cca
import train_var_cca
from cca.data.image_sets import NpzImages
from cca.data.labels import class_names
from cca.sampling.grid import draw_grid
from models import UserError, find_files
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
