"""The evaluation suite of guided-diffusion (Dhariwal & Nichol, 2021) on torch-fidelity's features.

Same numbers from the same files: FID and sFID against the statistics of a reference, inception
score over runs of 5,000 images in file order, improved precision and recall against its images.
"""

import hashlib
import json
import os
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cca.data import to_uint8_tensor
from cca.distributed import Processes
from cca.errors import UserError
from cca.features import Extractor, Features
from cca.image_sets import FolderOfImages, NpzImages
from cca.metrics import Gaussian, frechet_distance, inception_score, precision_recall
from models.checkpoints import file_sha256, write_binary
from models.zoo import ZOO

METRICS = ("fid", "sfid", "is", "precision", "recall", "accuracy")
PUBLISHED_SAMPLES, REFERENCE_IMAGES = 50_000, 10_000
CACHED_IMAGES = 50_000  # features of larger references are not kept


@dataclass(frozen=True)
class Seconds:
    """Time by part of an evaluation."""

    parts: dict[str, float]

    def measure(self, name: str, began: float) -> None:
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - began


def extract(
    images: NpzImages | FolderOfImages, extractor: Extractor, batch_size: int, processes: Processes
) -> Features | None:
    """Features of a whole set, dealt out over the processes; on the main one (None elsewhere)."""
    if len(images) < max(5, processes.world):
        raise UserError(
            f"{images.path}: holds {len(images)} images; at least {max(5, processes.world)} are needed"
        )
    share = processes.share(len(images))
    parts: list[Features] = []
    with tqdm(
        total=share.stop - share.start,
        desc=f"features of {images.path.name}",
        unit="image",
        leave=False,
        disable=not processes.main,
    ) as bar:
        for batch in images.batches(share, batch_size):
            parts.append(extractor(to_uint8_tensor(batch)))
            bar.update(len(batch))
    columns = [list(column) for column in zip(*((f.pooled, f.spatial, f.probabilities) for f in parts))]
    joined = [None if column[0] is None else processes.gather(torch.cat(column)) for column in columns]
    return Features(*joined) if processes.main else None


@dataclass(frozen=True)
class Reference:
    """What samples are held against: Gaussians of the whole set, and features of (some of) its images."""

    pooled: Gaussian | None
    spatial: Gaussian | None
    features: np.ndarray | None
    whole_set_statistics: bool
    images: int


def content_hash(images: NpzImages | FolderOfImages) -> str:
    if isinstance(images, NpzImages):
        return file_sha256(images.path)
    digest = hashlib.sha256()
    for file in images.files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def cache_path(images: NpzImages | FolderOfImages, extractor: Extractor) -> Path:
    """Where a reference's features are kept: named by the content of the images and of the extractor."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cca-evaluator"
    return (
        home
        / f"{hashlib.sha256((content_hash(images) + extractor.weights_sha256 + extractor.name).encode()).hexdigest()}.npz"
    )


def read_cache(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def reference_features(
    images: NpzImages | FolderOfImages, extractor: Extractor, batch_size: int, processes: Processes
) -> dict[str, np.ndarray]:
    """Pooled and spatial features of the reference's images, from the cache if they were taken before."""
    path = cache_path(images, extractor)
    arrays = read_cache(path)
    # All extract, or none: nodes may not share the cache.
    if (
        processes.sum(torch.tensor([float(arrays is not None)], device=processes.device)).item()
        == processes.world
    ):
        return arrays
    found = extract(images, extractor, batch_size, processes)
    if found is None:
        return {}
    arrays = {
        k: v.numpy() for k, v in (("pooled", found.pooled), ("spatial", found.spatial)) if v is not None
    }
    if len(images) <= CACHED_IMAGES:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_binary(path, lambda file: np.savez(file, **arrays))
    return arrays


def load_reference(
    images: NpzImages | FolderOfImages, extractor: Extractor, batch_size: int, processes: Processes
) -> Reference:
    """Statistics of the file where it has them, else of its images."""
    statistics = images.statistics()
    arrays = reference_features(images, extractor, batch_size, processes) if len(images) else {}
    width = arrays["pooled"].shape[1] if arrays else None
    if "mu" in statistics and width and statistics["mu"].shape != (width,):
        raise UserError(
            f"{images.path}: mu has {statistics['mu'].shape[0]} dimensions, --features {extractor.name} gives {width}"
        )

    def gaussian(mu: str, sigma: str, features: str) -> Gaussian | None:
        if mu in statistics and sigma in statistics:
            return Gaussian(statistics[mu], statistics[sigma])
        return Gaussian.of(arrays[features]) if features in arrays else None

    return Reference(
        gaussian("mu", "sigma", "pooled"),
        gaussian("mu_s", "sigma_s", "spatial"),
        arrays.get("pooled"),
        "mu" in statistics,
        len(images),
    )


def evaluate(
    samples: Features,
    labels: np.ndarray | None,
    reference: Reference,
    metrics: tuple[str, ...],
    seconds: Seconds,
    device: torch.device,
) -> tuple[dict[str, float], list[str]]:
    """The metrics asked for, and a note for each that these files do not give.

    "accuracy" is the share of samples that the extractor's classifier gives the class they were
    made for; it needs a classifier of the samples' own classes, which Inception is not.
    """
    values: dict[str, float] = {}
    notes: list[str] = []
    pooled = samples.pooled.numpy()
    for metric in metrics:
        began = time.perf_counter()
        if metric == "fid" and reference.pooled:
            values["fid"] = frechet_distance(Gaussian.of(pooled), reference.pooled)
        elif metric == "sfid" and samples.spatial is not None and reference.spatial:
            values["sfid"] = frechet_distance(Gaussian.of(samples.spatial.numpy()), reference.spatial)
        elif metric == "is" and samples.probabilities is not None:
            values["is"] = inception_score(samples.probabilities.numpy())
        elif metric in ("precision", "recall") and reference.features is not None:
            if not {"precision", "recall"} & set(values):
                both = dict(
                    zip(("precision", "recall"), precision_recall(pooled, reference.features, device=device))
                )
                values |= {name: value for name, value in both.items() if name in metrics}
        elif (
            metric == "accuracy"
            and labels is not None
            and samples.probabilities is not None
            and samples.probabilities.shape[1] == 10
        ):
            values["accuracy"] = float((samples.probabilities.argmax(1).numpy() == labels).mean())
        elif metric not in ("sfid", "accuracy") or metrics != METRICS:
            notes.append(f"{metric} is left out: these files or features do not give it")
        seconds.measure("precision and recall" if metric in ("precision", "recall") else metric, began)
    return values, notes


def comparability(samples: NpzImages | FolderOfImages, labels: np.ndarray | None, found: Features, reference: Reference, extractor: Extractor,
                  reference_images: NpzImages | FolderOfImages) -> list[str]:  # fmt: skip
    """What makes the figures not comparable with published ones."""
    notes = [*samples.notes(), *reference_images.notes()]
    if not extractor.is_inception:
        notes.append(f"features are '{extractor.name}', not Inception: figures compare with each other only")
    if len(samples) < PUBLISHED_SAMPLES:
        notes.append(f"{len(samples):,} samples instead of 50,000: FID is biased upwards")
    if not reference.whole_set_statistics:
        notes.append(
            f"the reference has no mu and sigma of a whole training set: FID is against its {reference.images:,} images"
        )
    elif reference.images and reference.images != REFERENCE_IMAGES:
        notes.append(
            f"precision and recall are against {reference.images:,} images, published ones against 10,000"
        )
    if len(reference_images) and samples.size != reference_images.size:
        notes.append(
            f"samples are {samples.size[0]} x {samples.size[1]}, reference images {reference_images.size[0]} x {reference_images.size[1]}"
        )
    scale = samples.sampling_report().get("options", {}).get("cfg_scale", 1.0)
    if scale != 1.0:
        notes.append(f"samples were made with guidance (--cfg-scale {scale:g}; VAR writes {scale - 1:g})")
    classes = (
        labels
        if labels is not None
        else None
        if found.probabilities is None
        else found.probabilities.argmax(1).numpy()
    )
    if classes is not None:
        notes += class_order_notes(classes, labels is not None)
    return notes


def class_order_notes(classes: np.ndarray, known: bool) -> list[str]:
    """Whether classes come in runs, and how even they are; of predicted classes only the first."""
    counts = np.bincount(classes)
    counts = counts[counts > 0]
    notes = []
    repeats, chance = (classes[1:] == classes[:-1]).mean(), np.square(counts / counts.sum()).sum()
    if len(counts) > 1 and repeats > 0.5 + 0.5 * chance:
        notes.append(
            "the images are sorted by class: the inception score is taken over runs of 5,000 in file order"
        )
    # A uniform draw of n images per class spreads by sqrt(n); four times that is no accident.
    if known and counts.max() - counts.min() > 8 * np.sqrt(counts.mean()):
        notes.append(f"classes are unbalanced: from {counts.min():,} to {counts.max():,} images per class")
    return notes


def compare(paths: list[Path]) -> str:
    """Results of several evaluations side by side, with the published figure of each model and the difference."""
    columns = [m for m in METRICS if m != "accuracy"]
    lines = [
        "| samples | " + " | ".join(columns) + " | published FID | difference |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for path in paths:
        try:
            content = json.loads(path.read_text())
            values, sampling = content["metrics"], content["samples"].get("sampling") or {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"--compare: {path} is not a result of eval_fid.py") from None
        published = ZOO[sampling["model"]].published if sampling.get("model") in ZOO else None
        figure = None
        if published:
            guided = sampling.get("cfg_scale", 1.0) != 1.0
            figure = (
                published.guided
                if guided
                else published.base
                if sampling.get("weights") == "base"
                else published.cca
            )
        cells = [f"{values[m]:.3f}" if m in values else "–" for m in columns]
        cells += (
            [f"{figure:.2f}", f"{values['fid'] - figure:+.3f}"] if figure and "fid" in values else ["–", "–"]
        )
        lines.append(f"| {Path(content['samples']['file']).name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
