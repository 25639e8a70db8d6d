"""Random numbers that belong to a thing (an image, an epoch), not to the process that draws them.

Counter-based streams (Philox, Salmon et al., 2011): the numbers of one image are a function of
the seed and its index alone, whatever the batch size, the number of processes or the order. Dropout is
the exception: its stream belongs to a step and a process, and seeds PyTorch's own generator.
"""

from collections.abc import Sequence

import numpy as np

# Streams of one seed; none may ever share a key with another.
DATA_ORDER, UNCONDITIONAL, TOKENS, CLASSES, CROPS, DROPOUT = range(6)


def stream(seed: int, purpose: int, *counters: int) -> np.random.Generator:
    """Generator of (seed, purpose, up to three counters), all of them integers from 0 to 2^64 - 1."""
    # Word 0 counts the numbers drawn. As lists, large integers would be rounded to floats.
    counter = np.array([0, *counters, *[0] * (3 - len(counters))], np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=counter))


def uniform_numbers(seed: int, purpose: int, indices: Sequence[int], count: int) -> np.ndarray:
    """Return ``count`` uniform numbers in [0, 1) of each index, [len(indices), count] float64."""
    return np.stack([stream(seed, purpose, index).random(count) for index in indices])
