"""Extraction of codes as users run it."""

import json

import numpy as np
from commands import expect_error, run
from made_data import make_image_folder


def test_extraction_from_a_folder(tmp_path):
    data = tmp_path / "data"
    make_image_folder(data, 60)
    common = ["-m", "scripts.extract_codes", "--model", "llamagen-mini", "--data", data]
    run(*common, "--output", tmp_path / "one")
    run(*common, "--output", tmp_path / "two", "--workers", 1, processes=2)
    one, two = (np.load(tmp_path / name / "codes.npy") for name in ("one", "two"))
    assert one.shape == (60, 10, 64) and (one != two).mean() < 1e-3
    assert json.loads((tmp_path / "one" / "header.json").read_text())["crop_range"] == 1.1
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["codes.npy", "header.json", "labels.npy"]
    labels = np.load(tmp_path / "one" / "labels.npy")
    assert len(labels) == 60 and (np.diff(labels) >= 0).all()
    expect_error([*common, "--output", tmp_path / "one"], "holds finished codes already")
