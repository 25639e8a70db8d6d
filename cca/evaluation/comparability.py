"""What figures may be held against: what makes them not comparable, and the published ones beside them."""

from pathlib import Path

import numpy as np

from cca.data.image_sets import ImageSet
from cca.evaluation.evaluator import METRICS, Reference
from cca.evaluation.features import Extractor, Features
from cca.evaluation.references import REFERENCE_IMAGES
from models import ZOO, UserError
from models.files import parse_json
from models.tables import markdown_table

PUBLISHED_SAMPLES = 50_000


def comparability(
    samples: ImageSet,
    labels: np.ndarray | None,
    found: Features,
    reference: Reference,
    extractor: Extractor,
    reference_images: ImageSet,
) -> list[str]:
    """What makes the figures not comparable with published ones."""
    notes = [*samples.notes(), *reference_images.notes()]
    if unlabelled := samples.why_unlabelled():
        notes.append(f"the samples' classes are not known: {unlabelled}")
    if not extractor.is_inception:
        notes.append(f"features are '{extractor.name}', not Inception: figures compare with each other only")
    if len(samples) < PUBLISHED_SAMPLES:
        notes.append(f"{len(samples):,} samples instead of 50,000: FID is biased upwards")
    if not reference.whole_set_statistics:
        notes.append(
            "the reference has no mu and sigma of a whole training set: "
            f"FID is against its {reference.images:,} images"
        )
    elif reference.images and reference.images != REFERENCE_IMAGES:
        notes.append(
            f"precision and recall are against {reference.images:,} images, published ones against 10,000"
        )
    if len(reference_images) and samples.size != reference_images.size:
        own, other = (f"{size[0]} x {size[1]}" for size in (samples.size, reference_images.size))
        notes.append(f"samples are {own}, reference images {other}")
    scale = samples.sampling_report().get("options", {}).get("cfg_scale", 1.0)
    if scale != 1.0:
        notes.append(f"samples were made with guidance (--cfg-scale {scale:g}; VAR writes {scale - 1:g})")
    classes = labels
    if classes is None and found.probabilities is not None:
        classes = found.probabilities.argmax(1).numpy()
    if classes is not None:
        notes += class_order_notes(classes, labels is not None)
    return notes


def class_order_notes(classes: np.ndarray, known: bool) -> list[str]:
    """Whether classes come in runs, and how even they are; of predicted classes only the first."""
    counts = np.unique(classes, return_counts=True)[1]
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
    """Results of several evaluations side by side, with each model's published figure and the difference."""
    columns = [name for name in METRICS if name != "accuracy"]
    rows = []
    for path in paths:
        try:
            content = parse_json(path.read_text())
            values = {column: float(value) for column, value in content["metrics"].items()}
            sampling = dict(content["samples"].get("sampling") or {})
            name = Path(content["samples"]["file"]).name
            published = ZOO[sampling["model"]].published if sampling.get("model") in ZOO else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"--compare: {path} is not a result of eval_fid.py") from None
        figure = None
        if published and sampling.get("cfg_scale", 1.0) != 1.0:
            figure = published.fid("guided")
        elif published:
            figure = published.fid("base" if sampling.get("weights") == "base" else "cca")
        cells = [
            f"{values[column]:.{METRICS[column].digits}f}" if column in values else "–" for column in columns
        ]
        if figure is not None and "fid" in values:
            cells += [f"{figure:.2f}", f"{values['fid'] - figure:+.3f}"]
        else:
            cells += ["–", "–"]
        rows.append([name, *cells])
    return markdown_table(["samples", *columns, "published FID", "difference"], rows)
