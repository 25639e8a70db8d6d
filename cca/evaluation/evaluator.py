"""The evaluation suite of guided-diffusion (Dhariwal & Nichol, 2021) on torch-fidelity's features.

Same numbers from the same files: FID and sFID against the statistics of a reference, inception
score over runs of 5,000 images in file order, improved precision and recall against its images.
"""

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cca.cli.output import Output
from cca.data.image_sets import ImageSet, to_uint8_tensor
from cca.distributed import Ranks
from cca.evaluation.features import Extractor, Features
from cca.evaluation.metrics import (
    Gaussian,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from cca.progress import ProgressBar
from models import UserError
from models.utils.files import cache_folder, write_binary
from models.utils.precision import ELSEWHERE, oom_as_user_error

CACHED_IMAGES = 50_000  # features of larger references are not kept
# Changes when a file gives other pixels or features than before: 2 scales 16-bit grey, 3 is without TF32.
PIXELS_VERSION = "3"


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Context manager that notes how long its block takes, as ``seconds[name]``."""
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def extract_batches(
    images: ImageSet, extractor: Extractor, batch_size: int, ranks: Ranks
) -> Iterator[tuple[np.ndarray, Features]]:
    """Yield this rank's share of the images, a batch at a time, with their features."""
    share = ranks.share(len(images))
    with ProgressBar(
        total=share.stop - share.start,
        desc=f"features of {images.path.name}",
        unit="image",
        leave=False,
        disable=not ranks.is_main,
    ) as bar:
        for batch in images.batches(share, batch_size):
            yield batch, extractor(to_uint8_tensor(batch))
            bar.update(len(batch))


def extract(images: ImageSet, extractor: Extractor, batch_size: int, ranks: Ranks) -> Features | None:
    """Features of a whole set, shared out over the ranks; on rank 0 (None elsewhere). Raises UserError."""
    parts = [features for _, features in extract_batches(images, extractor, batch_size, ranks)]
    whole: list[Any] = [
        None if values[0] is None else ranks.gather(torch.cat(values)) for values in zip(*parts)
    ]
    return Features(*whole) if ranks.is_main else None


class Reference(NamedTuple):
    """What samples are compared with: Gaussians of a whole set, and features [n, D] of its images."""

    pooled: Gaussian | None
    spatial: Gaussian | None
    features: np.ndarray | None


def cache_path(images: ImageSet, extractor: Extractor) -> Path:
    """Where a reference's features are kept: named by the content of the images and of the extractor."""
    parts = (images.content_hash(), extractor.weights_sha256, extractor.name, PIXELS_VERSION)
    return cache_folder() / f"{hashlib.sha256(''.join(parts).encode()).hexdigest()}.npz"


def read_cache(path: Path) -> dict[str, Any]:
    """Features that were kept; empty where there are none, or the file is damaged: it is made again."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            return dict(file)
    except Exception:  # a damaged file can raise anything
        return {}


def write_cache(path: Path, arrays: dict[str, Any]) -> None:
    """Keep features; where that fails a warning says so, since the evaluation can do without."""
    try:
        with Output(path, option="cache").lock():
            write_binary(path, lambda file: np.savez(file, **arrays))
    except UserError as error:
        print(f"warning: the reference's features are not kept: {error}", file=sys.stderr)


def reference_features(
    images: ImageSet, extractor: Extractor, batch_size: int, ranks: Ranks
) -> dict[str, Any]:
    """Pooled and spatial features of the reference's images, from the cache if they were taken before."""
    is_kept = len(images) <= CACHED_IMAGES
    arrays = read_cache(cache_path(images, extractor)) if is_kept else {}
    if not ranks.any_rank(not arrays):  # all extract, or none: nodes may not share the cache
        return arrays
    found = extract(images, extractor, batch_size, ranks)
    if found is None:
        return {}
    kept = {"pooled": found.pooled, "spatial": found.spatial}
    arrays = {name: features.numpy() for name, features in kept.items() if features is not None}
    if is_kept:
        write_cache(cache_path(images, extractor), arrays)
    return arrays


def load_reference(images: ImageSet, extractor: Extractor, batch_size: int, ranks: Ranks) -> Reference:
    """Statistics of the file where it has them, else of its images.

    Raises UserError for statistics of other features.
    """
    statistics = images.statistics
    blank = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    for name, found in zip(("mu", "mu_s"), extractor(blank) if statistics else ()):  # pooled and spatial
        if found is not None and name in statistics and len(statistics[name]) != found.shape[1]:
            raise UserError(
                f"{images.path}: {name} has {len(statistics[name])} dimensions, "
                f"--features {extractor.name} gives {found.shape[1]}"
            )
    arrays = reference_features(images, extractor, batch_size, ranks) if len(images) else {}

    def gaussian(mu: str, sigma: str, features: str) -> Gaussian | None:
        if mu in statistics and sigma in statistics:
            return Gaussian(statistics[mu], statistics[sigma])
        return Gaussian.of(arrays[features]) if features in arrays else None

    return Reference(
        pooled=gaussian("mu", "sigma", "pooled"),
        spatial=gaussian("mu_s", "sigma_s", "spatial"),
        features=arrays.get("pooled"),
    )


@dataclass(frozen=True)
class Comparison:
    """Samples held against a reference: what a metric is a function of.

    labels: the classes [N] that the samples were made for, None where they are not known.
    """

    samples: Features
    reference: Reference
    labels: np.ndarray | None
    device: torch.device

    @cached_property
    def precision_and_recall(self) -> tuple[float, float] | tuple[None, None]:
        if self.reference.features is None:
            return None, None
        return precision_recall(self.samples.pooled.numpy(), self.reference.features, device=self.device)


def distance(features: Tensor | None, reference: Gaussian | None) -> float | None:
    if features is None or reference is None:
        return None
    return frechet_distance(Gaussian.of(features.numpy()), reference)


def accuracy(compared: Comparison) -> float | None:
    """Share of samples that the extractor's classifier gives the class they were made for.

    It needs a classifier of the samples' own classes, which Inception is not, and knows no others.
    """
    labels, probabilities = compared.labels, compared.samples.probabilities
    if labels is None or probabilities.shape[1] != 10 or labels.max() >= 10:
        return None
    return float((probabilities.argmax(1).numpy() == labels).mean())


def kid(compared: Comparison) -> float | None:
    reference, samples = compared.reference.features, compared.samples.pooled
    return None if reference is None else kernel_distance(samples.numpy(), reference, device=compared.device)


@dataclass(frozen=True)
class Metric:
    """A figure of a comparison; ``measure`` gives None where these files or features have none.

    always: whether one asks for it by asking for nothing in particular, and is told when it is left out.
    digits: after the point, in tables.
    """

    measure: Callable[[Comparison], float | None]
    always: bool = True
    digits: int = 3


METRICS: dict[str, Metric] = {
    "fid": Metric(lambda compared: distance(compared.samples.pooled, compared.reference.pooled)),
    "sfid": Metric(
        lambda compared: distance(compared.samples.spatial, compared.reference.spatial), always=False
    ),
    "is": Metric(lambda compared: inception_score(compared.samples.probabilities.numpy())),
    "precision": Metric(lambda compared: compared.precision_and_recall[0]),
    "recall": Metric(lambda compared: compared.precision_and_recall[1]),
    "kid": Metric(kid, always=False, digits=5),
    "accuracy": Metric(accuracy, always=False),
}


def evaluate(
    compared: Comparison, asked: tuple[str, ...] | None, seconds: dict[str, float]
) -> tuple[dict[str, float], list[str]]:
    """Return the metrics asked for (None: all), and a note for each that these files do not give.

    ``seconds`` gets the time that each one took.
    Raises UserError for a metric that is not finite, or that the GPU's memory does not suffice for.
    """
    values: dict[str, float] = {}
    notes: list[str] = []
    for name in asked or METRICS:
        with (
            timed(seconds, name),
            oom_as_user_error(f"--metrics: {name} does not fit in GPU memory; leave it out, or {ELSEWHERE}"),
        ):
            value = METRICS[name].measure(compared)
        if value is not None and not math.isfinite(value):
            raise UserError(f"--metrics: {name} is {value}: features or statistics out of all proportion")
        if value is not None:
            values[name] = value
        elif asked or METRICS[name].always:
            notes.append(f"{name} is left out: these files or features do not give it")
    return values, notes
