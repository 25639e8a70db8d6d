"""Comparability of metrics: why they are not comparable with published ones, and tables of both."""

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

# Texts that describe the sampling, from the options that sample.py records and eval_fid.py's --resize.
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
        dict.fromkeys(  # equal sizes appear once
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
    comparison: Comparison, samples: ImageSet, reference: ImageSet, extractor: Extractor
) -> list[str]:
    """Return notes on why the metrics are not comparable with published ones."""
    own, other = (f"{images.size[0]} x {images.size[1]}" for images in (samples, reference))
    has_statistics = {"mu", "sigma"} <= reference.statistics.keys()
    scale = read_sampling_options(samples.path).get("cfg_scale", 1.0)
    remarks = [
        (samples.why_unlabelled, f"the classes of the samples are unknown: {samples.why_unlabelled}"),
        (
            not extractor.is_inception,
            f"features are '{extractor.name}', not Inception: compare these metrics only with each other",
        ),
        (
            len(samples) < 50_000,
            f"{len(samples):,} samples instead of 50,000: FID is biased upwards",
        ),
        (
            not has_statistics,
            "the reference has no mu and sigma of a whole training set: "
            f"FID compares with its {len(reference):,} images",
        ),
        (
            has_statistics and len(reference) not in (0, REFERENCE_IMAGES),
            f"precision and recall compare with {len(reference):,} images; published values use 10,000",
        ),
        (len(reference) and own != other, f"samples are {own}, but reference images are {other}"),
        (
            scale != 1,
            f"samples were made with guidance (--cfg-scale {scale:g}; VAR writes {scale - 1:g})",
        ),
        *class_remarks(comparison),
    ]
    return [*samples.notes(), *reference.notes(), *(remark for holds, remark in remarks if holds)]


def class_remarks(comparison: Comparison) -> list[tuple[bool, str]]:
    """Return remarks on sorted and on unbalanced classes, each with whether it holds.

    Without labels, predicted classes show only whether the images are sorted.
    """
    labels = comparison.labels
    classes = comparison.samples.probabilities.argmax(1).numpy() if labels is None else labels
    counts = np.unique(classes, return_counts=True)[1]
    repeats, chance = (classes[1:] == classes[:-1]).mean(), np.square(counts / counts.sum()).sum()
    return [
        (
            len(counts) > 1 and repeats > 0.5 + 0.5 * chance,
            "the images are sorted by class: the inception score uses splits of 5,000 images in file order",
        ),
        (
            # Random counts of mean n have a standard deviation of sqrt(n); the limit is 4 of them.
            labels is not None and counts.max() - counts.min() > 8 * np.sqrt(counts.mean()),
            f"classes are unbalanced: from {counts.min():,} to {counts.max():,} images per class",
        ),
    ]


def compare(paths: list[Path]) -> str:
    """Return a table of several results, with each model's published FID and the difference from it.

    Settings that the metrics depend on have a column if the results differ in them; filters always have one.
    Raise UserError for a file that eval_fid.py did not write.
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
    """Return (cells of a result by column, settings that its metrics depend on by column).

    The second compares results: for a file it holds the hash. Raise UserError, with the option's name, for a
    file that eval_fid.py did not write.
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
    """Return texts that describe the sampling; "not recorded" if the options are missing."""
    try:
        return {name: text(options) for name, text in SAMPLED_WITH.items()}
    except KeyError:
        return dict.fromkeys(SAMPLED_WITH, "not recorded")


def _published_cells(
    sampling: Mapping[str, Any], fid: float | None, own: Mapping[str, str]
) -> tuple[str, str]:
    """Return the published FID, and the difference from it or why the two are not comparable."""
    model, weights = sampling.get("model"), sampling.get("weights")
    if fid is None or model not in ZOO:
        return "–", "no FID" if fid is None else "the sampling is not recorded"
    entry, guided = ZOO[model], sampling.get("cfg_scale", 1) != 1
    trained = sampling.get("loss", weights if weights in ("base", "cca") else "weights of unknown training")
    sampled = {"base": "guided"}.get(trained, f"{trained} with guidance") if guided else trained
    published = entry.published
    if published is None or (figure := published.fid(sampled)) is None:
        return "–", f"no FID is published for {model}, {sampled}"
    if sampled == "base" and published.has_filters:
        return f"{figure:.2f}", "the paper does not state its filters"
    settings = {
        "count": "50,000",
        "features": INCEPTION,
        "reference": next(
            (name for name, it in REFERENCES.items() if it.resolution == published.eval_size), "none"
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
    other = [f"{name} {own[name]} instead of {text}" for name, text in settings.items() if own[name] != text]
    return f"{figure:.2f}", "; ".join(other) or f"{fid - figure:+.3f}"
