"""Captions of grids: the class name, or the class number if the font lacks a character."""

import numpy as np
import pytest

from cca.sampling.grid import caption_font, draw_grid

IMAGES = np.full((2, 32, 32, 3), 128, np.uint8)


def draw(name):
    return np.asarray(draw_grid(IMAGES, 2, [name, "dog"], [7, 8]))


@pytest.mark.parametrize("name", ["Käfer", "собака", "σκύλος", "rødspætte", "cat"])
def test_names_in_other_alphabets(name):
    font = caption_font()
    # All letters look different, so none of them is the box for a missing character.
    assert len({bytes(font.getmask(c)) for c in name}) == len(set(name))
    assert not np.array_equal(draw(name), draw("class 7"))


@pytest.mark.parametrize("name", ["犬", "dog 🐶"])
def test_characters_missing_in_the_font(name):
    assert np.array_equal(draw(name), draw("class 7"))
    draw_grid(IMAGES, 2, [name, name])  # without class numbers this must not fail


def test_nfc_and_nfd_names_are_equal():
    assert np.array_equal(draw("Ka\u0308fer"), draw("K\u00e4fer"))
