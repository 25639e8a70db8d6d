"""Random numbers that belong to a thing (an image, an epoch), not to the process that draws them.

Counter-based streams (Philox, Salmon et al., 2011): the numbers of one image are a function of
the seed and its index alone, whatever the batch size, the number of processes or the order.
"""

import numpy as np

# Streams of one seed; none may ever share a key with another.
DATA_ORDER, UNCONDITIONAL, TOKENS, CLASSES, CROPS, DROPOUT = range(6)


def stream(seed: int, purpose: int, *counters: int) -> np.random.Generator:
    """Generator of (seed, purpose, up to three counters)."""
    counter = [0, *counters, *[0] * (3 - len(counters))]  # word 0 counts the numbers drawn
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=counter))
