"""The evaluation suite of guided-diffusion (Dhariwal & Nichol, 2021) on torch-fidelity's features.

It reproduces that suite's values: FID and sFID against the statistics of a reference, the inception score
over splits of 5,000 images in file order, and improved precision and recall against the reference's images.
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
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from cca.data.image_sets import ImageSet, to_uint8_tensor
from cca.distributed import Ranks
from cca.evaluation.features import Extractor, Features
from cca.evaluation.metrics import (
    Gaussian,
    frechet_distance,
    inception_score,
    precision_recall,
)
from cca.progress import ProgressBar
from models import UserError
from models.utils.files import cache_folder, cache_lock, read_cached, write_cached, writing
from models.utils.precision import ELSEWHERE, oom_as_user_error

CACHED_IMAGES = 50_000  # features of larger references are not cached
# Changes when a file gives other pixels or features than before: 2 scales 16-bit grey, 3 omits TF32.
PIXELS_VERSION = "3"


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Context manager that stores the duration of its block in ``seconds[name]``."""
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def extract_batches(
    images: ImageSet, extractor: Extractor, batch_size: int, ranks: Ranks
) -> Iterator[tuple[np.ndarray, Features]]:
    """Yield this rank's share of the images in batches, with their features."""
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
    """Return the features of a whole set on rank 0, else None; each rank extracts its share."""
    parts = [features for _, features in extract_batches(images, extractor, batch_size, ranks)]
    whole: list[Any] = [
        None if values[0] is None else ranks.gather(torch.cat(values)) for values in zip(*parts)
    ]
    return Features(*whole) if ranks.is_main else None


class Reference(NamedTuple):
    """A reference: Gaussians of a whole set, and pooled features [n, D] of its images; None if absent."""

    pooled: Gaussian | None
    spatial: Gaussian | None
    features: np.ndarray | None


def cache_path(images: ImageSet, extractor: Extractor) -> Path:
    """Return the path of the cached features, named by the content of the images and the extractor."""
    parts = (images.content_hash(), extractor.weights_sha256, extractor.name, PIXELS_VERSION)
    return cache_folder() / f"{hashlib.sha256(''.join(parts).encode()).hexdigest()}.npz"


def write_cache(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write features to the cache. If that fails, print a warning: the evaluation can continue."""
    try:
        with writing(path), cache_lock(path):
            write_cached(path, arrays)
    except UserError as error:
        print(f"warning: the reference's features are not cached: {error}", file=sys.stderr)


def reference_features(
    images: ImageSet, extractor: Extractor, batch_size: int, ranks: Ranks
) -> dict[str, np.ndarray]:
    """Return pooled and spatial features of the reference's images, from the cache if possible.

    On other ranks than rank 0 the result may be empty.
    """
    cache = cache_path(images, extractor) if len(images) <= CACHED_IMAGES else None
    arrays = read_cached(cache) if cache else {}
    # Either all ranks extract or none, because nodes may not share the cache.
    if not ranks.any_rank(not arrays):
        return arrays
    extracted = extract(images, extractor, batch_size, ranks)
    if extracted is None:
        return {}
    by_name = {"pooled": extracted.pooled, "spatial": extracted.spatial}
    arrays = {name: features.numpy() for name, features in by_name.items() if features is not None}
    if cache:
        write_cache(cache, arrays)
    return arrays


def load_reference(images: ImageSet, extractor: Extractor, batch_size: int, ranks: Ranks) -> Reference:
    """Return the reference with the statistics that the file holds, or else those of its images.

    Raise UserError if the file holds statistics of other features.
    """
    statistics = images.statistics
    blank = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    for name, features in zip(("mu", "mu_s"), extractor(blank) if statistics else ()):  # pooled and spatial
        if features is not None and name in statistics and len(statistics[name]) != features.shape[1]:
            raise UserError(
                f"{images.path}: {name} has {len(statistics[name])} dimensions; "
                f"--features {extractor.name} needs {features.shape[1]}"
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
    """Samples and the reference that they are compared with: the input of every metric.

    labels: the classes int64 [N] of the samples, or None if they are unknown.
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


def accuracy(comparison: Comparison) -> float | None:
    """Return the share of samples that the extractor assigns to their class, or None.

    The extractor must classify the ten classes of the bundled images. Inception does not.
    """
    labels, probabilities = comparison.labels, comparison.samples.probabilities
    if labels is None or probabilities.shape[1] != 10 or labels.max() >= 10:
        return None
    return float((probabilities.argmax(1).numpy() == labels).mean())


def kid(comparison: Comparison) -> float | None:
    """Return torch-fidelity's KID (Bińkowski et al., 2018, arXiv 1801.01401); None without reference images.

    With fewer than 1,000 images the random subsets are smaller.
    """
    reference, samples = comparison.reference.features, comparison.samples.pooled
    if reference is None:
        return None
    size = min(1000, len(samples), len(reference))
    found = kid_features_to_metric(samples, torch.from_numpy(reference), kid_subset_size=size, verbose=False)
    return found[KEY_METRIC_KID_MEAN]


@dataclass(frozen=True)
class Metric:
    """A metric.

    measure: function that returns the value, or None if the files or features do not allow it.
    always: whether a note says that it is left out, even if ``--metrics`` does not name it.
    digits: decimal places in tables.
    """

    measure: Callable[[Comparison], float | None]
    always: bool = True
    digits: int = 3


METRICS: dict[str, Metric] = {
    "fid": Metric(lambda it: distance(it.samples.pooled, it.reference.pooled)),
    "sfid": Metric(lambda it: distance(it.samples.spatial, it.reference.spatial), always=False),
    "is": Metric(lambda it: inception_score(it.samples.probabilities.numpy())),
    "precision": Metric(lambda it: it.precision_and_recall[0]),
    "recall": Metric(lambda it: it.precision_and_recall[1]),
    "kid": Metric(kid, always=False, digits=5),
    "accuracy": Metric(accuracy, always=False),
}


def evaluate(
    comparison: Comparison, names: tuple[str, ...] | None, seconds: dict[str, float]
) -> tuple[dict[str, float], list[str]]:
    """Return the metrics of these names (None: all), and a note for each metric that is left out.

    Store the duration of each metric in ``seconds``. Raise UserError for a metric that is not finite, or if
    GPU memory runs out.
    """
    values: dict[str, float] = {}
    notes: list[str] = []
    for name in names or METRICS:
        with (
            timed(seconds, name),
            oom_as_user_error(f"--metrics: {name} does not fit in GPU memory; leave it out, or {ELSEWHERE}"),
        ):
            value = METRICS[name].measure(comparison)
        if value is not None and not math.isfinite(value):
            raise UserError(
                f"--metrics: {name} is {value}; expected a finite value: check the features and statistics"
            )
        if value is not None:
            values[name] = value
        elif names or METRICS[name].always:
            notes.append(f"{name} is left out: it cannot be computed from these files and features")
    return values, notes
