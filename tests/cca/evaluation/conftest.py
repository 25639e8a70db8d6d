"""Fixtures of the evaluator's tests: bundled images, and functions that evaluate and write images."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import REFERENCE, TRAIN
from made_data import bundled
from PIL import Image

import eval_fid


@pytest.fixture
def evaluate(tmp_path, monkeypatch, request):
    """Return a function that runs eval_fid.py and returns the results that it wrote.

    The current folder holds samples.npz and reference.npz, each with as many images as the test module's
    ``IMAGES``.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, source in (("samples", TRAIN), ("reference", REFERENCE)):
        np.savez(f"{name}.npz", **bundled(request.module.IMAGES, source))

    def run(
        samples="samples.npz",
        *options,
        reference="reference.npz",
        features=("--features", "mini"),
        output="out.json",
    ):
        if output == "out.json":  # the default output, which each call replaces
            Path(output).unlink(missing_ok=True)
        files = ["--samples", samples, "--reference", reference, "--output", output]
        eval_fid.main([*features, *files, *options])
        return json.loads(Path(output).read_text(), parse_constant=pytest.fail)

    return run


@pytest.fixture
def write_folder(evaluate):
    """Return a function that writes images to a folder, or to class folders if it is called with labels."""

    def write(path, images, labels=None, suffix=".png"):
        for i, image in enumerate(images):
            place = Path(path, f"{i:03d}{suffix}" if labels is None else f"{labels[i]}/{i:03d}{suffix}")
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place)

    return write
