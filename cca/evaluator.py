"""Features of image sets and the metrics on them."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch_fidelity.registry
from torch import Tensor
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

import cca.features  # noqa: F401  (registers the extractor "mini")
from cca.data import load_image_array
from cca.errors import UserError
from cca.metrics import Gaussian, frechet_distance, inception_score, precision_recall

METRICS = ("fid", "is", "precision", "recall", "accuracy")
# Extractor -> (feature layer, class logits layer, image side it takes)
LAYERS = {"mini": ("96", "logits", 32)}


@dataclass(frozen=True)
class ImageSet:
    """Features [N, D], class probabilities [N, classes] and labels [N] of one set of images."""

    features: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray


@torch.inference_mode()
def image_set(path: Path, features_name: str, batch_size: int) -> ImageSet:
    """Run a feature extractor over all images of an .npz."""
    extractor = make_extractor(features_name)
    images, labels = load_image_array(path)
    side = LAYERS[features_name][2]
    if images.shape[1:3] != (side, side):
        raise UserError(f"{path}: images are {images.shape[1]} x {images.shape[2]}, --features {features_name} takes {side} x {side}")
    if len(images) < 5:
        raise UserError(f"{path}: holds {len(images)} images; at least 5 are needed")
    features, probabilities = [], []
    for start in tqdm(range(0, len(images), batch_size), desc=f"features of {path.name}", leave=False):
        found, logits = extractor(as_extractor_input(images[start : start + batch_size]))
        features.append(found.numpy())
        probabilities.append(logits.softmax(-1).numpy())
    return ImageSet(np.concatenate(features), np.concatenate(probabilities), labels)


def as_extractor_input(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W(, 3)] -> uint8 [N, 3, H, W]."""
    pixels = torch.from_numpy(images)
    return pixels[:, None].expand(-1, 3, -1, -1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)


@functools.cache
def make_extractor(name: str) -> torch.nn.Module:
    """A registered torch-fidelity feature extractor, giving (features, class logits)."""
    if name not in LAYERS or name not in torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY:
        raise UserError(f"--features: {name!r} is not one of {', '.join(LAYERS)}")
    return create_feature_extractor(name, list(LAYERS[name][:2]), cuda=False, verbose=False)


def evaluate(samples: ImageSet, reference: ImageSet, metrics: tuple[str, ...]) -> dict[str, float]:
    """The metrics asked for; "accuracy" is the share of samples that the extractor's classifier
    gives the class they were made for."""
    values: dict[str, float] = {}
    if "fid" in metrics:
        values["fid"] = frechet_distance(Gaussian.of(samples.features), Gaussian.of(reference.features))
    if "is" in metrics:
        values["is"] = inception_score(samples.probabilities)
    if "precision" in metrics or "recall" in metrics:
        both = dict(zip(("precision", "recall"), precision_recall(samples.features, reference.features)))
        values |= {name: value for name, value in both.items() if name in metrics}
    if "accuracy" in metrics:
        values["accuracy"] = float((samples.probabilities.argmax(1) == samples.labels).mean())
    return values


def comparability(samples: ImageSet, features: str) -> list[str]:
    """What makes the figures not comparable with published ones."""
    notes = []
    if features != "inception":
        notes.append(f"features are '{features}', not Inception: figures compare with each other only")
    if len(samples.labels) < 50_000:
        notes.append(f"{len(samples.labels):,} samples instead of 50,000: FID is biased upwards")
    counts = np.bincount(samples.labels)
    if counts.max() > 1.5 * max(counts.mean(), 1):
        notes.append("classes are unbalanced")
    if len(counts) > 1 and (np.diff(samples.labels) >= 0).all():
        notes.append("the file is sorted by class: the inception score is taken over runs of 5,000 in file order")
    return notes
