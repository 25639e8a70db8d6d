"""The quickstart's report: a Markdown table, a picture per backbone, a chart of FID over guidance scale."""

import statistics
from pathlib import Path

import matplotlib
import numpy as np

from models.files import atomic_write
from models.tables import markdown_table
from models.zoo import FASHION_CLASSES

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MODELS = ("llamagen-mini", "var-mini")
ROWS = {
    "base": "base, no guidance",
    "base_cfg": "base, best guidance",
    "cca": "CCA, no guidance",
    "sft": "control: maximum likelihood, no guidance",
}
COLUMNS = (
    ("fid", "FID ↓", ".3f"),
    ("is", "IS ↑", ".3f"),
    ("precision", "precision ↑", ".3f"),
    ("recall", "recall ↑", ".3f"),
    ("accuracy", "class accuracy ↑", ".3f"),
    ("seconds_per_image", "ms per image ↓", ".2f"),
)


def gap_closed(results: dict) -> float:
    """Share of the FID gap between base and best guided base that CCA closes without guidance."""
    base, guided, cca = (results[k]["fid"] for k in ("base", "base_cfg", "cca"))
    return (base - cca) / (base - guided)


def spread(values: list[float], form: str) -> str:
    """Mean ± sample standard deviation; a single value as it is."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


def table_row(label: str, runs: list[dict]) -> list[str]:
    """Cells of one kind of sample, over one or several runs."""
    cells = [label]
    for name, _, form in COLUMNS:
        factor = 1000 if name == "seconds_per_image" else 1
        known = runs[0].get(name) is not None
        cells.append(spread([factor * run[name] for run in runs], form) if known else "–")
    return cells


def results_table(rows: list[list[str]]) -> list[str]:
    return [markdown_table(["samples", *(title for _, title, _ in COLUMNS)], rows), ""]


def model_table(model: str, results: dict) -> list[str]:
    rows = []
    for kind, label in ROWS.items():
        if kind in results:
            scale = f" (scale {results[kind]['cfg_scale']})" if kind == "base_cfg" else ""
            rows.append(table_row(label + scale, [results[kind]]))
    for temperature, metrics in results.get("temperature", {}).items():
        rows.append(table_row(f"control: base at temperature {temperature}", [metrics]))
    lines = [f"## {model}", "", *results_table(rows)]
    cca, guided = results["cca"], results["base_cfg"]
    lines += [
        f"CCA without guidance has {cca['fid'] / guided['fid']:.2f} × the FID of the best guided base, "
        f"closes {gap_closed(results):.0%} of the gap, "
        f"and takes {cca['seconds_per_image'] / guided['seconds_per_image']:.2f} × its time.",
        "",
        f"![samples]({model}.png)",
        "",
    ]
    return lines


def write_table(folder: Path, summary: dict) -> None:
    lines = [
        "# Quickstart",
        "",
        f"{summary['samples']:,} samples per row against the 10,000 Fashion-MNIST test images; "
        f"features of the bundled network; seed {summary['seed']}, {summary['threads']} CPU threads, "
        f"{summary['wall_seconds']:.0f} s in all.",
        "",
    ]
    for model in MODELS:
        lines += model_table(model, summary[model])
    lines += ["![FID over guidance scale](fid.png)", ""]
    atomic_write(folder / "report.md", lambda temporary: temporary.write_text("\n".join(lines)))


def save_figure(figure: plt.Figure, path: Path) -> None:
    atomic_write(
        path, lambda temporary: figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight")
    )
    plt.close(figure)


def write_picture(folder: Path, model: str, results: dict, rows: int = 4) -> None:
    """The same classes (columns) and random numbers (rows) from the three ways of sampling."""
    scale = results["base_cfg"]["cfg_scale"]
    panels = (
        ("base", "base, no guidance", f"{model}-base"),
        ("base_cfg", f"base, guidance {scale}", f"{model}-base-cfg{scale}"),
        ("cca", "CCA, no guidance", f"{model}-cca"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(17, 3.2))
    for axis, (kind, title, name) in zip(axes, panels):
        with np.load(folder / "samples" / f"{name}.npz") as file:
            images = file["arr_0"][: 10 * rows]  # balanced order: image i has class i mod 10
        sheet = images.reshape(rows, 10, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(rows * 32, 320, 3)
        axis.imshow(sheet, interpolation="nearest")
        axis.set_title(f"{title}   (FID {results[kind]['fid']:.2f})")
        axis.set_xticks(np.arange(16, 320, 32), FASHION_CLASSES, rotation=40, ha="right", fontsize=8)
        axis.set_yticks([])
    save_figure(figure, folder / f"{model}.png")


def write_chart(folder: Path, summary: dict) -> None:
    figure, axes = plt.subplots(1, len(MODELS), figsize=(11, 3.8))
    for axis, model in zip(axes, MODELS):
        results = summary[model]
        scales = [1.0, *map(float, results["sweep"])]
        fids = [results["base"]["fid"], *(m["fid"] for m in results["sweep"].values())]
        axis.plot(scales, fids, "o-", color="tab:blue", label="base, guided (two passes per image)")
        axis.plot(
            [1.0],
            [results["cca"]["fid"]],
            "*",
            markersize=15,
            color="tab:red",
            label="CCA, no guidance (one pass)",
        )
        axis.axhline(results["cca"]["fid"], color="tab:red", linestyle=":", linewidth=1)
        if "sft" in results:
            axis.plot(
                [1.0],
                [results["sft"]["fid"]],
                "x",
                markersize=9,
                color="tab:gray",
                label="maximum likelihood, no guidance",
            )
        axis.set(title=model, xlabel="guidance scale", ylabel="FID (bundled feature network)", ylim=(0, None))
        axis.legend(fontsize=8)
    save_figure(figure, folder / "fid.png")


def write_report(folder: Path, summary: dict) -> None:
    write_table(folder, summary)
    for model in MODELS:
        write_picture(folder, model, summary[model])
    write_chart(folder, summary)
    print(
        f"\n{(folder / 'report.md').read_text()}\n"
        f"report: {folder}/report.md, {folder}/summary.json, pictures beside them"
    )
