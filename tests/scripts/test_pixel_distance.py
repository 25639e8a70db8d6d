"""The Fréchet distance of pixels, which needs no network."""

import numpy as np
import pytest
from commands import REFERENCE, ROOT, TRAIN
from made_data import bundled

from scripts.pixel_distance import pixel_distance


def test_distance_grows_with_the_error(tmp_path):
    images, _ = bundled(4000).values()
    noise = np.random.default_rng(0).normal(0, 40, images.shape)
    variants = {
        "as they are": images,
        "colour": np.repeat(images[..., None], 3, axis=3),
        "noisy": (images + noise).clip(0, 255).astype(np.uint8),
        "darker": images // 2,
    }
    distances = {}
    for name, pixels in variants.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels)
        distances[name] = pixel_distance(tmp_path / f"{name}.npz", str(ROOT / REFERENCE), str(ROOT / TRAIN))
    assert distances["colour"] == pytest.approx(distances["as they are"], rel=1e-9)
    assert 0 < distances["as they are"] < 0.2 * distances["noisy"] < 0.2 * distances["darker"]
