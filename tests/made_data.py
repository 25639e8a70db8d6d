"""Small data sets for tests, and an object whose pickle executes code."""

import json
import os

import numpy as np
from commands import ROOT, TRAIN
from PIL import Image


def bundled(images, file=TRAIN):
    """Return the first images (arr_0) and labels (arr_1) of a file, by default the bundled training set."""
    with np.load(ROOT / file) as content:
        return {key: content[key][:images] for key in ("arr_0", "arr_1")}


class Hostile:
    """Object whose pickle creates the folder "executed" when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def make_codes(folder, images=40, published=False):
    """Write random codes for llamagen-mini and return their folder.

    The layout is packed, or with ``published`` that of the official code (one file per image).
    """
    generator = np.random.default_rng(0)
    codes, labels = generator.integers(0, 512, (images, 10, 64)), np.arange(images) % 10
    path = folder / "codes"
    if published:
        for name, arrays in (("imagenet32_codes", codes[:, None]), ("imagenet32_labels", labels[:, None])):
            (path / name).mkdir(parents=True)
            for i, array in enumerate(arrays):
                np.save(path / name / f"{i}.npy", array)
        return path
    path.mkdir(parents=True)
    np.save(path / "codes.npy", codes.astype(np.uint16))
    np.save(path / "labels.npy", labels)
    (path / "header.json").write_text(json.dumps({"vocab_size": 512}))
    return path


def make_picture(path, grey=0, size=(32, 32)):
    """Write an image of one grey level; ``size`` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)


def make_image_folder(path, images):
    """Write images as train/CLASS/NAME.png, as in ImageNet, and return the path of a damaged one.

    Their resolution is not that of the model. The second image of class 3 is cut off.
    """
    for i, (image, label) in enumerate(zip(*bundled(images).values())):
        target = path / "train" / f"class{label}" / f"{i:04d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((40, 48)).save(target)
    broken = sorted((path / "train" / "class3").iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:100])
    return broken
