"""The report of an experiment as Markdown: tables, sentences and pictures.

With several seeds a report states means ± standard deviations over the seeds.
"""

import statistics
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.table import provenance
from cca.cli.tables import markdown_table
from cca.data.image_sets import NpzImages
from models import ZOO
from models.utils.files import atomic_write
from models.zoo.loading import build_model
from models.zoo.registry import class_name
from scripts.recipes import ABLATED, LOSS_LABELS, SHEET, Row, left_out, published_fid

Figures = dict[str, dict]  # the metrics of one seed, by the key of the row
Results = dict[str, tuple[list[Row], list[Figures]]]  # for each model its rows, and the figures of all seeds
# Name of the metric, title of the column, format.
COLUMNS = (
    ("fid", "FID ↓", ".3f"), ("is", "IS ↑", ".3f"), ("sfid", "sFID ↓", ".2f"),
    ("precision", "precision ↑", ".3f"), ("recall", "recall ↑", ".3f"),
    ("accuracy", "class accuracy ↑", ".3f"), ("pixel_fid", "FID of pixels ↓", ".3f"),
    ("published", "published FID", ".2f"), ("difference", "difference", "+.3f"),
)  # fmt: skip
# Lines of the plots: label in the legend, what the numbers at the points mean, and matplotlib's format.
SERIES = {
    "guidance": ("base, guidance", "scale", "o-"),
    "lambda": ("CCA, no guidance", "lambda", "s--"),
    "beta": ("CCA, no guidance", "beta", "^--"),
    "free": ("base, no guidance, no filters", "", "D"),
    "recipe": ("CCA, the recipe, no guidance", "", "*"),
    "control": ("control: maximum likelihood", "", "x"),
    "on top": ("CCA with guidance on top", "scale", "s-"),
}
# Offset of the number beside a point, in points: the numbers of different lines must not overlap.
NUMBERS_AT = {"guidance": (0, -14), "lambda": (-8, 9), "beta": (12, 8), "on top": (0, 10)}
CHARTS = {"tradeoff": "inception score", "with-guidance": "inception score", "quickstart": "guidance scale"}
# Ratios of FID in the paper: CCA without guidance to the guided base, and to the base without guidance.
PAPER_OVER_GUIDED, PAPER_OVER_BASE = "1.02 to 1.33", "0.18 to 0.48"


def spread(values: Sequence[float], form: str) -> str:
    """Return mean ± sample standard deviation as text; a single value alone."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form.removeprefix('+')}}"


def with_published(row: Row, run: Figures) -> dict:
    """Return the figures of a row for one seed, with the published FID and the difference if there is one."""
    if row.published is None:
        return run[row.key]
    return {**run[row.key], "published": row.published, "difference": run[row.key]["fid"] - row.published}


def cell(runs: list[dict], name: str, form: str) -> str:
    """Return a table's cell: a metric of one row over all seeds."""
    if not all(name in run for run in runs):
        return "–"
    if name == "published":  # the same for every seed
        runs = runs[:1]
    return spread([run[name] for run in runs], form)


def figures_table(rows: list[Row], seeds: list[Figures]) -> str:
    """Return a table with one line per row. Metrics that no row has get no column; the best mean is bold."""
    figures = {row.label: [with_published(row, run) for run in seeds] for row in rows}
    columns = [c for c in COLUMNS if any(c[0] in run for runs in figures.values() for run in runs)]
    lines = [[label] for label in figures]
    for name, title, form in columns:
        cells = [cell(runs, name, form) for runs in figures.values()]
        means = {i: statistics.mean(run[name] for run in runs)
                 for i, runs in enumerate(figures.values()) if cells[i] != "–"}  # fmt: skip
        choose = {"↓": min, "↑": max}.get(title[-1])
        if choose and means:
            best = choose(means, key=means.__getitem__)
            cells[best] = f"**{cells[best]}**"
        for line, text in zip(lines, cells):
            line.append(text)
    return markdown_table(["samples", *(title for _, title, _ in columns)], lines)


def heading(args: Namespace, ranks: int, seconds: float) -> str:
    """Return the text above the tables: command, date, machine, versions, ranks, seconds and seeds."""
    seeds = ", ".join(str(args.seed + i) for i in range(args.seeds))
    text = f"{provenance(args.command)}, ranks: {ranks}, {seconds:.0f} s; seed {seeds}."
    if args.seeds > 1:
        text += " Mean ± standard deviation over the seeds."
    if args.experiment == "samples":
        return text
    samples = f"{args.num_samples:,} samples per row, compared with {Path(args.reference).name}"
    return f"{text}\n\n{samples}; features: {args.features}."


def on(rows: list[Row], series: str) -> list[Row]:
    """Return the rows on a line of the plot, sorted by the value that varies along it."""
    return sorted((row for row in rows if series in row.series), key=lambda row: row.series[series])


def mean(seeds: list[Figures], row: Row, metric: str) -> float:
    return statistics.mean(run[row.key][metric] for run in seeds)


def best_guided(rows: list[Row], run: Figures) -> Row:
    """Return the row with the lowest FID among those with guidance, for one seed."""
    return min(on(rows, "guidance")[1:], key=lambda row: run[row.key]["fid"])


def with_best_guided(rows: list[Row], seeds: list[Figures]) -> list[Row]:
    """Return the rows with "guided" as the second: the base at each seed's best guidance scale.

    Adds the figures of that row to ``seeds``.
    """
    best = [best_guided(rows, run) for run in seeds]
    scale = f" (scale {best[0].series['guidance']:g})" if len(set(best)) == 1 else ""
    guided = Row(best[0].model, "guided", f"base, best guidance{scale}")
    for row, run in zip(best, seeds):
        run[guided.key] = {**run[row.key], "file": row.key}
    return [rows[0], guided, *rows[1:]]


def quickstart_remarks(rows: list[Row], seeds: list[Figures]) -> list[str]:
    """Return sentences on the results, with the paper's ranges."""

    def values(kind: str, metric: str = "fid") -> list[float]:
        return [run[f"{rows[0].model}-{kind}"][metric] for run in seeds]

    def ratio(a: str, b: str, metric: str = "fid") -> str:
        return spread([x / y for x, y in zip(values(a, metric), values(b, metric))], ".2f")

    fids = zip(values("base"), values("guided"), values("cca"))
    gaps = [(base - cca) / (base - guided) for base, guided, cca in fids]
    recall = [a - b for a, b in zip(values("cca", "recall"), values("guided", "recall"))]
    remarks = [
        f"Without guidance, the FID of CCA is {ratio('cca', 'guided')} × that of the best guided base "
        f"(paper: {PAPER_OVER_GUIDED}) and {ratio('cca', 'base')} × that of the base without guidance "
        f"(paper: {PAPER_OVER_BASE}). CCA closes {spread(gaps, '.2f')} of the gap between the two. "
        f"Its recall differs from the guided base's by {spread(recall, '+.3f')}."
    ]
    if all(
        values("guided", "images_per_second") + values("cca", "images_per_second")
    ):  # null if the last run had nothing left to sample
        remarks.append(
            f"CCA takes {ratio('guided', 'cca', 'images_per_second')} × the sampling time of guidance."
        )
    if "pixel_fid" in seeds[0][rows[0].key]:
        guided, cca = ratio("guided", "base", "pixel_fid"), ratio("cca", "base", "pixel_fid")
        remarks.append(
            f"The FID of pixels, which uses no network, is {guided} × that of the base without guidance for "
            f"the best guided base, and {cca} × for CCA."
        )
    if any(row.name == "sft" for row in rows):
        remarks.append(f"The control, maximum likelihood, has {ratio('sft', 'base')} × the FID of the base.")
    return remarks


def ablation_remarks(rows: list[Row], seeds: list[Figures]) -> list[str]:
    """Return sentences: the order of the losses here and in the paper's table 3, and the missing losses."""
    model = rows[0].model
    by_fid = sorted(rows, key=lambda row: mean(seeds, row, "fid"))
    names = [row.label.replace(", no guidance", "") for row in by_fid]
    remarks = [f"Order by FID: {' < '.join(names)}."]
    labels = {"base": "base", **LOSS_LABELS}
    for other in ABLATED:
        if ZOO[other].backbone is ZOO[model].backbone:
            fids = [(fid, label) for what, label in labels.items() if (fid := published_fid(other, what))]
            order = " < ".join(f"{label} ({fid:.2f})" for fid, label in sorted(fids))
            remarks.append(f"The paper's order, {other}: {order}.")
    return [*remarks, *filter(None, [left_out(model, rows)])]


def with_guidance_remarks(rows: list[Row], seeds: list[Figures]) -> list[str]:
    """Return a sentence on the best FID of guidance alone and of CCA with guidance."""
    alone, on_top = (
        statistics.mean(min(run[row.key]["fid"] for row in on(rows, series)) for run in seeds)
        for series in ("guidance", "on top")
    )
    return [f"Best FID: guidance alone {alone:.3f}, CCA with guidance on top {on_top:.3f}."]


def tradeoff_remarks(rows: list[Row], seeds: list[Figures]) -> list[str]:
    """Return sentences on the FID of CCA's points minus that of guidance, at equal inception score."""
    remarks = []
    for series in ("lambda", "beta"):
        points, curve = on(rows, series), on(rows, "guidance")
        distances = [distances_to_curve(pairs(curve, run), pairs(points, run)) for run in seeds]
        means = [statistics.mean(values) for values in distances if values]
        inside = " or ".join(str(n) for n in sorted({len(values) for values in distances}))
        remarks.append(
            f"CCA over {series}. Its FID minus that of guidance at equal inception score: "
            f"{spread(means, '+.3f')} (mean of the {inside} of {len(points)} points "
            "within the curve's range; at 0 or below CCA is as good)."
            if means
            else f"CCA over {series}. No point lies within the inception scores of the guidance curve."
        )
    return remarks


def distances_to_curve(curve: list[tuple[float, float]], points: list[tuple[float, float]]) -> list[float]:
    """Return the FID of each point (IS, FID) minus the FID of a curve at equal IS, by linear interpolation.

    Points outside the curve's range of IS are left out.
    """
    scores, fids = zip(*sorted(curve))
    return [
        fid - float(np.interp(score, scores, fids))
        for score, fid in points
        if scores[0] <= score <= scores[-1]
    ]


def pairs(rows: list[Row], figures: Figures) -> list[tuple[float, float]]:
    """Return (IS, FID) for each row."""
    return [(figures[row.key]["is"], figures[row.key]["fid"]) for row in rows]


def save_figure(figure: Figure, path: Path) -> None:
    atomic_write(
        path, lambda temporary: figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight")
    )


def deviation(seeds: list[Figures], row: Row, metric: str) -> float:
    """Return the standard deviation over the seeds; 0 for one seed."""
    return statistics.stdev(run[row.key][metric] for run in seeds) if len(seeds) > 1 else 0.0


def bar_chart(path: Path, results: Results) -> None:
    """Plot FID without guidance, before and after CCA, for all models (figure 1)."""
    figure = Figure(figsize=(2 + 1.6 * len(results), 4.6))
    axis, labels = figure.subplots(), list[str]()
    for place, (rows, seeds) in enumerate(results.values()):
        unguided = [row for row in rows if "no guidance" in row.label]
        labels += [row.label for row in unguided if row.label not in labels]
        for i, row in enumerate(unguided):
            width = 0.8 / len(unguided)
            axis.bar(
                place - 0.4 + (i + 0.5) * width, mean(seeds, row, "fid"), 0.95 * width,
                yerr=deviation(seeds, row, "fid"), color=f"C{labels.index(row.label)}",
            )  # fmt: skip
    for i, label in enumerate(labels):
        axis.bar(0, 0, color=f"C{i}", label=label)
    axis.set_xticks(range(len(results)), list(results))
    axis.set(ylabel="FID without guidance")
    axis.legend(fontsize=8)
    save_figure(figure, path)


def fid_chart(path: Path, results: Results, over: str) -> None:
    """Plot the mean FID over the "inception score" or the "guidance scale", one panel per model.

    The guidance scale of CCA is 1. Error bars are standard deviations over the seeds.
    """
    figure = Figure(figsize=(6.4 * len(results), 4.6))
    axes = figure.subplots(1, len(results), squeeze=False)
    by_scale = over == "guidance scale"
    for axis, (model, (rows, seeds)) in zip(axes[0], results.items()):
        for series, (label, numbers, form) in SERIES.items():
            points = on(rows, series)
            has_numbers = len(points) > 1 and not by_scale
            label += f" (numbers: {numbers})" if has_numbers else ""
            fids = [mean(seeds, row, "fid") for row in points]
            across = [row.series[series] if by_scale else mean(seeds, row, "is") for row in points]
            errors = [deviation(seeds, row, "fid") for row in points]
            if points:
                size = 12 if form == "*" else 6
                line = axis.errorbar(across, fids, errors, fmt=form, label=label, markersize=size, capsize=2)
            for row, place in zip(points, zip(across, fids)) if has_numbers else ():
                axis.annotate(
                    f"{row.series[series]:g}", place, textcoords="offset points", fontsize=7,
                    xytext=NUMBERS_AT[series], ha="center", color=line.lines[0].get_color(),
                )  # fmt: skip
        if by_scale:
            axis.axhline(mean(seeds, on(rows, "recipe")[0], "fid"), color="tab:gray", linestyle=":")
        axis.set_ylim(0)
        axis.set(title=model, xlabel=over, ylabel="FID")
        axis.legend(fontsize=8)
    save_figure(figure, path)


def sample_sheet(
    path: Path, rows: list[Row], run: Figures, columns: int, lines: int, names: Sequence[str] = ()
) -> None:
    """Plot the samples of several rows side by side, image i of each row from the same random numbers.

    names: labels below the columns of each panel.
    """
    figure = Figure(figsize=(5.6 * len(rows), 5.6 * lines / columns + 0.9))
    axes = figure.subplots(1, len(rows), squeeze=False)
    for axis, row in zip(axes[0], rows):
        figures = run.get(row.key, {})
        samples = NpzImages(path.parent / "samples" / f"{figures.get('file', row.key)}.npz")
        (images,) = samples.batches(slice(0, columns * lines), columns * lines)
        height, width = samples.size
        sheet = images.reshape(lines, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
        axis.imshow(sheet.reshape(lines * height, columns * width, 3), interpolation="nearest")
        fid = f"   (FID {figures['fid']:.2f})" if figures else ""
        axis.set(title=row.label + fid, yticks=[])
        places = np.arange(len(names)) * width + width / 2
        axis.set_xticks(places, names, rotation=40, ha="right", fontsize=8)
    save_figure(figure, path)


def samples_section(args: Namespace, rows: list[Row], run: Figures) -> list[str]:
    """Plot one class, sampled in three ways with the same random numbers (figures 7 and 8)."""
    path = args.output / f"samples-{rows[0].model}-class{args.label}.png"
    sample_sheet(path, rows, run, *SHEET)
    return [f"Class {args.label}, with the same random numbers in each panel.", f"![samples]({path.name})"]


def quickstart_section(args: Namespace, rows: list[Row], run: Figures) -> list[str]:
    """Plot samples of base, guided base and CCA, with one column per class."""
    model = rows[0].model
    classes = build_model(model).num_classes
    names = [class_name(i, classes) for i in range(min(classes, 10))]
    panels = [row for row in rows if row.name in ("base", "guided", "cca")]
    sample_sheet(args.output / f"{model}.png", panels, run, len(names), 4, names)
    return [f"![the same classes (columns) and random numbers from three ways of sampling]({model}.png)"]


def write_report(args: Namespace, results: Results, ranks: int, seconds: float) -> None:
    """Write OUTPUT/EXPERIMENT.md (quickstart: report.md) and its pictures, and print the text.

    Args:
        args: options of scripts/reproduce.py.
        ranks: number of ranks on which each command ran.
        seconds: time that all commands took.
    """
    name = args.experiment
    sections = [f"# {name.replace('-', ' ').capitalize()}", heading(args, ranks, seconds)]
    for model, (rows, seeds) in results.items():
        sections.append(f"## {model}")
        if name in PICTURES:
            sections += PICTURES[name](args, rows, seeds[0])
        if name != "samples":
            sections.append(figures_table(rows, seeds))
        if name in REMARKS:
            sections += REMARKS[name](rows, seeds)
    report, picture = ("report", "fid.png") if name == "quickstart" else (name, f"{name}.png")
    if name in CHARTS:
        fid_chart(args.output / picture, results, CHARTS[name])
        sections.append(f"![FID over {CHARTS[name]}]({picture})")
    elif "tables" in name:
        bar_chart(args.output / picture, results)
        sections.append(f"![FID without guidance, before and after]({picture})")
    path, text = args.output / f"{report}.md", "\n\n".join(sections) + "\n"
    atomic_write(path, lambda temporary: temporary.write_text(text))
    print(f"\n{text}\nwritten to {path}")


PICTURES = {"quickstart": quickstart_section, "samples": samples_section}
REMARKS = {
    "quickstart": quickstart_remarks, "ablation": ablation_remarks,
    "with-guidance": with_guidance_remarks, "tradeoff": tradeoff_remarks,
}  # fmt: skip
