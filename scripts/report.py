"""Tables and pictures of experiments: figures of one or several seeds, as Markdown and matplotlib."""

import datetime
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch

from cca.data.image_sets import NpzImages
from models.files import atomic_write
from models.tables import markdown_table
from models.zoo import class_name
from scripts.pipeline import Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

Figures = dict[str, dict]  # by the key of a row
METRICS = (
    ("fid", "FID ↓", ".3f"), ("is", "IS ↑", ".3f"), ("sfid", "sFID ↓", ".2f"),
    ("precision", "precision ↑", ".3f"), ("recall", "recall ↑", ".3f"),
    ("accuracy", "class accuracy ↑", ".3f"),
)  # fmt: skip


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± sample standard deviation; a single value as it is."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form.removeprefix('+')}}"


def cell(runs: list[dict], name: str, form: str, factor: float = 1.0) -> str:
    values = [factor * run[name] for run in runs if run.get(name) is not None]
    return spread(values, form) if len(values) == len(runs) else "–"


def figures_table(rows: list[Row], seeds: list[Figures]) -> str:
    """One line per row, without columns that no row has; with published figures where there are any."""
    every = [run[row.key] for run in seeds for row in rows]
    columns = [column for column in METRICS if any(column[0] in figures for figures in every)]
    published = any(row.published for row in rows)
    hours = any("training_hours" in figures for figures in every)
    titles = ["samples", *(title for _, title, _ in columns)]
    titles += ["published FID", "difference"] if published else []
    titles += ["images/s"] + (["processor-hours of training"] if hours else [])
    lines = []
    for row in rows:
        runs = [run[row.key] for run in seeds]
        line = [row.label, *(cell(runs, name, form) for name, _, form in columns)]
        if published:
            known = row.published is not None
            line.append(f"{row.published:.2f}" if known else "–")
            line.append(spread([run["fid"] - row.published for run in runs], "+.3f") if known else "–")
        line.append(cell(runs, "images_per_second", ".1f"))
        lines.append(line + ([cell(runs, "training_hours", ".3f")] if hours else []))
    return markdown_table(titles, lines)


def provenance(command: str, seeds: Iterable[int]) -> str:
    """What stands above every table: command, date, machine, versions, seeds."""
    numbers = ", ".join(map(str, seeds))
    return (
        f"`{command}`, {datetime.date.today()}, {processor()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}; seed {numbers}."
        + (" Mean ± standard deviation over the seeds." if "," in numbers else "")
    )


def processor() -> str:
    """What the machine calls its first GPU, or its CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def distances_to_curve(curve: list[tuple[float, float]], points: list[tuple[float, float]]) -> list[float]:
    """FID of each point (IS, FID) minus that of a curve at equal IS, by linear interpolation.

    Points whose IS lies beyond the curve's are left out.
    """
    scores, fids = zip(*sorted(curve))
    return [
        fid - float(np.interp(score, scores, fids))
        for score, fid in points
        if scores[0] <= score <= scores[-1]
    ]


def pairs(rows: list[Row], figures: Figures) -> list[tuple[float, float]]:
    """(IS, FID) of rows."""
    return [(figures[row.key]["is"], figures[row.key]["fid"]) for row in rows]


def save_figure(figure: plt.Figure, path: Path) -> None:
    atomic_write(
        path, lambda temporary: figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight")
    )
    plt.close(figure)


def tradeoff_chart(
    path: Path, panels: dict[str, dict[str, tuple[list[Row], str]]], seeds: list[Figures]
) -> None:
    """FID over IS, a panel per model: series by name, each of rows and a matplotlib format; seeds' means."""
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.6), squeeze=False)
    for axis, (model, series) in zip(axes[0], panels.items()):
        for name, (rows, form) in series.items():
            means = np.mean([pairs(rows, run) for run in seeds], axis=0)
            axis.plot(*means.T, form, label=name, markersize=7)
            for (score, fid), row in zip(means, rows) if len(rows) > 1 else ():
                axis.annotate(
                    row.label.split()[-1].replace("guidance", "1"),
                    (score, fid),
                    textcoords="offset points",
                    xytext=(4, 5),
                    fontsize=7,
                )
        axis.set(title=model, xlabel="inception score", ylabel="FID")
        axis.legend(fontsize=8)
    save_figure(figure, path)


def sample_sheet(
    path: Path, rows: list[tuple[str, Path]], columns: int, lines: int, classes: int | None = None
) -> None:
    """Samples of several files side by side: image i of each is from the same random numbers.

    classes: names of the first ``columns`` classes of so many stand below each panel.
    """
    figure, axes = plt.subplots(1, len(rows), figsize=(5.6 * len(rows), 5.6 * lines / columns + 0.9))
    for axis, (title, file) in zip(np.atleast_1d(axes), rows):
        samples = NpzImages(file)
        (images,) = samples.batches(slice(0, columns * lines), columns * lines)
        height, width = samples.size
        sheet = images.reshape(lines, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
        axis.imshow(sheet.reshape(lines * height, columns * width, 3), interpolation="nearest")
        axis.set_title(title)
        axis.set_yticks([])
        places = np.arange(columns) * width + width / 2
        names = [class_name(i, classes) for i in range(columns)] if classes else []
        axis.set_xticks(places if names else [], names, rotation=40, ha="right", fontsize=8)
    save_figure(figure, path)


def fid_chart(path: Path, models: dict[str, dict]) -> None:
    """FID of the base over its guidance scale beside CCA's: a panel per model of the quickstart."""
    figure, axes = plt.subplots(1, len(models), figsize=(5.5 * len(models), 3.8), squeeze=False)
    for axis, (model, results) in zip(axes[0], models.items()):
        main = results["main"]
        scales = [1.0, *(row["scale"] for row in results["sweep"])]
        fids = [main["base"]["fid"], *(row["fid"] for row in results["sweep"])]
        axis.plot(scales, fids, "o-", color="tab:blue", label="base, guided (two passes per image)")
        axis.plot(
            [1.0],
            [main["cca"]["fid"]],
            "*",
            markersize=15,
            color="tab:red",
            label="CCA, no guidance (one pass)",
        )
        axis.axhline(main["cca"]["fid"], color="tab:red", linestyle=":", linewidth=1)
        if "sft" in main:
            axis.plot(
                [1.0], [main["sft"]["fid"]], "x", markersize=9, color="tab:gray", label="maximum likelihood"
            )
        axis.set(title=model, xlabel="guidance scale", ylabel="FID (bundled feature network)", ylim=(0, None))
        axis.legend(fontsize=8)
    save_figure(figure, path)
