"""The Fréchet distance that no network takes part in."""

import numpy as np
import pytest
from commands import REFERENCE, ROOT, TRAIN
from made_data import bundled

from scripts.pixel_distance import pixel_distance


def test_it_orders_images_by_how_wrong_they_are(tmp_path):
    images, _ = bundled(4000).values()
    noise = np.random.default_rng(0).normal(0, 40, images.shape)
    wrong = {
        "as they are": images,
        "colour": np.repeat(images[..., None], 3, axis=3),
        "noisy": (images + noise).clip(0, 255).astype(np.uint8),
        "darker": images // 2,
    }
    found = {}
    for name, pixels in wrong.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels)
        found[name] = pixel_distance(tmp_path / f"{name}.npz", str(ROOT / REFERENCE), str(ROOT / TRAIN))
    assert found["colour"] == pytest.approx(found["as they are"], rel=1e-9)
    assert 0 < found["as they are"] < 0.2 * found["noisy"] < 0.2 * found["darker"]
