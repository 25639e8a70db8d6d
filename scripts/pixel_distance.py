"""A Fréchet distance without a network: its features are principal components of the pixels."""

from functools import cache
from pathlib import Path

import numpy as np

from cca.data.image_sets import NpzImages
from cca.evaluation.metrics import Gaussian, frechet_distance

COMPONENTS = 64


def read_pixels(path: str | Path) -> np.ndarray:
    """Return the images of an .npz as grey pixels in 0 … 1, [N, H * W] float64."""
    images = NpzImages(Path(path))
    (pixels,) = images.batches(slice(0, len(images)), len(images))
    grey = pixels.mean(-1) if pixels.ndim == 4 else pixels
    return grey.reshape(len(grey), -1) / 255


@cache
def components(training: str) -> np.ndarray:
    """Return the directions [H * W, COMPONENTS] along which the training images vary most."""
    return np.linalg.eigh(np.cov(read_pixels(training), rowvar=False))[1][:, -COMPONENTS:]


@cache
def reference_gaussian(reference: str, training: str) -> Gaussian:
    """Return the Gaussian fitted to the features of the reference images."""
    return Gaussian.of(read_pixels(reference) @ components(training))


def pixel_distance(samples: Path, reference: str, training: str) -> float:
    """Return the Fréchet distance of samples to reference images, in principal components of the pixels.

    The three arguments are .npz files of small images. The components come from the training images.
    """
    own = Gaussian.of(read_pixels(samples) @ components(training))
    return frechet_distance(own, reference_gaussian(reference, training))
