"""What figures may be held against: what makes them not comparable, and the published ones beside them."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cca.cli.tables import markdown_table
from cca.data.image_sets import ImageSet, read_sampling_options
from cca.evaluation.evaluator import METRICS, Comparison
from cca.evaluation.features import INCEPTION, Extractor
from cca.evaluation.references import REFERENCE_IMAGES, REFERENCES
from models import ZOO, UserError
from models.utils.files import FORMAT, finite_or_none, read_json

Row = tuple[dict[str, str], dict[str, str]]  # see ``read_row``

# What samples were made with, as text, from the options that sample.py records and eval_fid.py's --resize.
SAMPLED_WITH: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "guidance": lambda of: (
        f"{of['cfg_scale']:g} ({of['cfg_schedule']}, {of['cfg_interval'] or 'all'} steps)"
        if of["cfg_scale"] != 1
        else "none"
    ),
    "filters": lambda of: (
        f"temperature {of['temperature']:g}, top-k {of['top_k'] or 'all'}, top-p {of['top_p']:g}"
    ),
    "size": lambda of: " resized to ".join(
        dict.fromkeys(  # one that stays is named once
            str(size)
            for size in (of["image_size"], of["eval_size"], of["resize"] and f"{of['resize']} by --resize")
            if size
        )
    ),
    "class order": lambda of: of["class_order"],
    "classes": lambda of: (
        f"{len(set(of['classes'])):,}"
        if len(set(of["classes"])) > 10
        else ", ".join(map(str, sorted(set(of["classes"]))))
    ),
}


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
    """Return a table of several results, with each model's published FID and the difference from it.

    What the figures depend on is a column where the results differ in it, and the filters always are.
    Raises UserError for a file that eval_fid.py did not write.
    """
    rows = [read_row(path, "--compare") for path in paths]
    shown = [
        name
        for name in rows[0][0]
        if name not in rows[0][1] or len({identities[name] for _, identities in rows}) > 1
    ]
    return markdown_table(
        shown, [[" ".join(cells[name].split()).replace("|", "\\|") for name in shown] for cells, _ in rows]
    )


def read_row(path: Path, option: str) -> Row:
    """Read a result as a row of a table: its cells by column, and what the figures depend on by column.

    The latter tells results apart: of a file it is the hash. Raises UserError, with the option's name, for
    a file that eval_fid.py did not write.
    """
    try:
        content = read_json(path)
        kind = content["format"], content["kind"], type(content["notes"])
        if kind != (FORMAT, "results", list) or finite_or_none(content) != content:  # NaN is never written
            raise ValueError
        return _make_row(content)
    except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{option}: {path} is not a result of eval_fid.py") from None


def _make_row(content: Mapping[str, Any]) -> Row:
    samples, reference, features = content["samples"], content["reference"], content["features"]
    sampling, metrics = samples["sampling"] or {}, content["metrics"]
    sampled_from = ", ".join(sampling[key] for key in ("model", "weights", "loss") if key in sampling)
    own = {
        "weights": sampled_from or "not recorded",
        **_texts({**sampling, "resize": content["options"]["resize"]}),
        "reference": str(reference.get("published") or f"file {Path(reference['file']).name}"),
        "features": str(features["extractor"]),
        "count": f"{samples['count']:,}",
    }
    files = {"weights": sampling, "reference": reference, "features": features}
    hashes = {name: file.get("weights_sha256", file.get("sha256")) for name, file in files.items()}
    cells = {
        "samples": Path(samples["file"]).name,
        **{name: f"{text} ({hashes[name][:8]})" if hashes.get(name) else text for name, text in own.items()},
        **{
            name: f"{metrics[name]:.{metric.digits}f}" if name in metrics else "–"
            for name, metric in METRICS.items()
            if name != "accuracy"
        },
    }
    published = zip(("published FID", "difference"), _published_cells(sampling, metrics.get("fid"), own))
    identities = {name: str(hashes.get(name) or text) for name, text in own.items() if name != "filters"}
    return {**cells, **dict(published)}, identities


def _texts(options: Mapping[str, Any]) -> dict[str, str]:
    """Return what samples were made with, as text; the options of samples without a record are not known."""
    try:
        return {name: text(options) for name, text in SAMPLED_WITH.items()}
    except KeyError:
        return dict.fromkeys(SAMPLED_WITH, "not recorded")


def _published_cells(
    sampling: Mapping[str, Any], fid: float | None, own: Mapping[str, str]
) -> tuple[str, str]:
    """Return the published FID, and the difference from it or what makes the two not comparable."""
    model, weights = sampling.get("model"), sampling.get("weights")
    if fid is None or model not in ZOO:
        return "–", "no FID" if fid is None else "how they were sampled is not recorded"
    entry, guided = ZOO[model], sampling.get("cfg_scale", 1) != 1
    trained = sampling.get("loss", weights if weights in ("base", "cca") else "weights of unknown training")
    sampled = {"base": "guided"}.get(trained, f"{trained} with guidance") if guided else trained
    published = entry.published
    if published is None or (figure := published.fid(sampled)) is None:
        return "–", f"no FID is published of {model}, {sampled}"
    if sampled == "base" and published.has_filters:
        return f"{figure:.2f}", "the paper does not state its filters"
    wanted = {
        "count": "50,000",
        "features": INCEPTION,
        "reference": next(
            (name for name, it in REFERENCES.items() if it.side == published.eval_size), "none"
        ),
        **_texts(
            {
                **asdict(published),
                "cfg_scale": published.cfg_scale if guided else 1,
                "cfg_schedule": entry.backbone.default_cfg_schedule,
                "cfg_interval": None,
                "temperature": 1,
                "image_size": entry.default_image_size,
                "classes": range(entry.transformer.num_classes),
                "resize": None,
            }
        ),
    }
    other = [f"{name} {own[name]} instead of {text}" for name, text in wanted.items() if own[name] != text]
    return f"{figure:.2f}", "; ".join(other) or f"{fid - figure:+.3f}"
