"""Captions of pictures of samples: a font that has most characters, or the class's number."""

import numpy as np
import pytest

from cca.sampling.grid import caption_font, draw_grid

IMAGES = np.full((2, 32, 32, 3), 128, np.uint8)


def drawn(name):
    return np.asarray(draw_grid(IMAGES, 2, [name, "dog"], [7, 8]))


@pytest.mark.parametrize("name", ["Käfer", "собака", "σκύλος", "rødspætte", "cat"])
def test_names_in_other_alphabets(name):
    font = caption_font()
    # Different letters look different: they are no boxes for missing characters.
    assert len({bytes(font.getmask(c)) for c in name}) == len(set(name))
    assert not np.array_equal(drawn(name), drawn("class 7"))


@pytest.mark.parametrize("name", ["犬", "dog 🐶"])
def test_names_that_no_font_has(name):
    assert np.array_equal(drawn(name), drawn("class 7"))
    draw_grid(IMAGES, 2, [name, name])  # without numbers it is drawn as it can be


def test_composed_and_decomposed_names():
    assert np.array_equal(drawn("Ka\u0308fer"), drawn("K\u00e4fer"))
