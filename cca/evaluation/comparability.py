"""What figures may be held against: what makes them not comparable, and the published ones beside them."""

from pathlib import Path

import numpy as np

from cca.cli.tables import markdown_table
from cca.data.image_sets import ImageSet, read_sampling_options
from cca.evaluation.evaluator import METRICS, Comparison
from cca.evaluation.features import Extractor
from cca.evaluation.references import REFERENCE_IMAGES
from models import ZOO, UserError
from models.utils.files import parse_json, regular


def comparability(
    compared: Comparison, samples: ImageSet, reference: ImageSet, extractor: Extractor
) -> list[str]:
    """What makes the figures not comparable with published ones."""
    own, other = (f"{images.size[0]} x {images.size[1]}" for images in (samples, reference))
    whole_set = {"mu", "sigma"} <= reference.statistics.keys()
    scale = read_sampling_options(samples.path).get("cfg_scale", 1.0)
    remarks = [
        (samples.why_unlabelled, f"the samples' classes are not known: {samples.why_unlabelled}"),
        (
            not extractor.is_inception,
            f"features are '{extractor.name}', not Inception: figures compare with each other only",
        ),
        (
            len(samples) < 50_000,
            f"{len(samples):,} samples instead of 50,000: FID is biased upwards",
        ),
        (
            not whole_set,
            "the reference has no mu and sigma of a whole training set: "
            f"FID is against its {len(reference):,} images",
        ),
        (
            whole_set and len(reference) not in (0, REFERENCE_IMAGES),
            f"precision and recall are against {len(reference):,} images, published ones against 10,000",
        ),
        (len(reference) and own != other, f"samples are {own}, reference images {other}"),
        (
            scale != 1,
            f"samples were made with guidance (--cfg-scale {scale:g}; VAR writes {scale - 1:g})",
        ),
        *class_remarks(compared),
    ]
    return [*samples.notes(), *reference.notes(), *(remark for holds, remark in remarks if holds)]


def class_remarks(compared: Comparison) -> list[tuple[bool, str]]:
    """Whether classes come in runs, and how uneven they are; of predicted classes only the first."""
    labels = compared.labels
    classes = compared.samples.probabilities.argmax(1).numpy() if labels is None else labels
    counts = np.unique(classes, return_counts=True)[1]
    repeats, chance = (classes[1:] == classes[:-1]).mean(), np.square(counts / counts.sum()).sum()
    return [
        (
            len(counts) > 1 and repeats > 0.5 + 0.5 * chance,
            "the images are sorted by class: the inception score is taken over runs of 5,000 in file order",
        ),
        (
            # A uniform draw of n images per class spreads by sqrt(n); four times that is no accident.
            labels is not None and counts.max() - counts.min() > 8 * np.sqrt(counts.mean()),
            f"classes are unbalanced: from {counts.min():,} to {counts.max():,} images per class",
        ),
    ]


def compare(paths: list[Path]) -> str:
    """A table of several evaluations, with each model's published FID and the difference from it.

    Raises UserError for a file that eval_fid.py did not write.
    """
    columns = [name for name in METRICS if name != "accuracy"]
    return markdown_table(
        ["samples", *columns, "published FID", "difference"],
        [result_cells(path, columns) for path in paths],
    )


def result_cells(path: Path, columns: list[str]) -> list[str]:
    """Return a row: the samples' name, metrics, published FID and difference from it. Raises UserError."""
    try:
        content = parse_json(regular(path).read_text())
        if content["format"] != 1:
            raise ValueError
        values = {column: float(value) for column, value in content["metrics"].items()}
        name, sampling = Path(content["samples"]["file"]).name, content["samples"]["sampling"] or {}
        settings = ZOO[sampling["model"]].published if sampling.get("model") in ZOO else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--compare: {path} is not a result of eval_fid.py") from None
    cells = [f"{values[c]:.{METRICS[c].digits}f}" if c in values else "–" for c in columns]
    guided, is_base = sampling.get("cfg_scale", 1.0) != 1.0, sampling.get("weights") == "base"
    published = settings.fid("guided" if guided else "base" if is_base else "cca") if settings else None
    if published is None or "fid" not in values:
        return [name, *cells, "–", "–"]
    return [name, *cells, f"{published:.2f}", f"{values['fid'] - published:+.3f}"]
