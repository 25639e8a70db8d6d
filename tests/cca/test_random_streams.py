"""Random streams of (seed, purpose, counters): known numbers, and other numbers for every seed."""

import numpy as np
import pytest

from cca.random_streams import CROPS, DATA_ORDER, TOKENS, stream


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**53 - 1])
@pytest.mark.parametrize("counters", [(), (7,), (3, 12345), (1, 2, 3)])
def test_streams_equal_those_of_earlier_versions(seed, counters):
    """Earlier versions passed the key as a list of integers, which NumPy keeps exact up to 2^53."""
    former = np.random.Philox(key=[seed, TOKENS], counter=[0, *counters, *[0] * (3 - len(counters))])
    expected = np.random.Generator(former).random(5)
    assert np.array_equal(stream(seed, TOKENS, *counters).random(5), expected)


def test_streams_give_known_numbers():
    assert stream(0, DATA_ORDER).permutation(8).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]
    assert stream(5, CROPS, 2, 9).integers(1000, size=4).tolist() == [596, 67, 556, 245]


def test_large_seeds_give_different_streams():
    seeds = (2**53, 2**53 + 1, 2**62, 2**62 + 1, 2**63 - 2, 2**63 - 1)
    assert len({float(stream(seed, TOKENS, 1).random()) for seed in seeds}) == len(seeds)
