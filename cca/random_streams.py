"""Random numbers that belong to an image or an epoch, not to the rank that samples them.

The streams are counter-based (Philox, Salmon et al., 2011). The numbers of an image depend only on the seed
and the image's index, not on the batch size, the number of ranks or the order. Dropout is the exception: its
stream belongs to a step and a rank, and seeds PyTorch's own generator.
"""

from collections.abc import Sequence

import numpy as np

# Purposes of the streams of one seed. Each must have a number of its own, or two streams would be equal.
DATA_ORDER, UNCONDITIONAL, TOKENS, CLASSES, CROPS, DROPOUT = range(6)


def stream(seed: int, purpose: int, *counters: int) -> np.random.Generator:
    """Return the generator of (seed, purpose, up to three counters); all are integers from 0 to 2^64 - 1."""
    # Philox itself increments word 0. NumPy would round large integers in a list to floats.
    counter = np.array([0, *counters, *[0] * (3 - len(counters))], np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=counter))


def uniform_numbers(seed: int, purpose: int, indices: Sequence[int], count: int) -> np.ndarray:
    """Return ``count`` uniform numbers in [0, 1) for each index: float64 [len(indices), count]."""
    return np.stack([stream(seed, purpose, index).random(count) for index in indices])
