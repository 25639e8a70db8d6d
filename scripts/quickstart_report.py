"""The quickstart's report, of one seed or several: tables, a picture per model, a chart of FID over scale."""

import statistics
from pathlib import Path

from models.files import atomic_write
from models.tables import markdown_table
from scripts.report import METRICS, cell, fid_chart, sample_sheet, spread

# In the paper: guidance-free CCA over the guided base, and over the unguided one.
PAPER_OVER_GUIDED, PAPER_OVER_BASE = "1.02 to 1.33", "0.16 to 0.5"
COLUMNS = tuple(column for column in METRICS if column[0] != "sfid")


def table_line(runs: list[dict]) -> list[str]:
    """Cells of one kind of samples over the seeds."""
    cells = [
        runs[0]["label"] if len({run["label"] for run in runs}) == 1 else runs[0]["label"].partition(" (")[0]
    ]
    cells += [cell(runs, name, form) for name, _, form in COLUMNS]
    return [*cells, cell(runs, "seconds_per_image", ".2f", 1000)]


def ratios(seeds: list[dict], name: str, a: str, b: str) -> list[float]:
    return [run["main"][a][name] / run["main"][b][name] for run in seeds]


def gaps_closed(seeds: list[dict]) -> list[float]:
    """Share of the FID gap between base and best guided base that CCA closes without guidance."""
    fids = [{kind: run["main"][kind]["fid"] for kind in ("base", "guided", "cca")} for run in seeds]
    return [(fid["base"] - fid["cca"]) / (fid["base"] - fid["guided"]) for fid in fids]


def verdict(model: str, seeds: list[dict]) -> str:
    """One sentence: what was seen, and the paper's own range."""
    over_guided, over_base = ratios(seeds, "fid", "cca", "guided"), ratios(seeds, "fid", "cca", "base")
    seconds = ratios(seeds, "seconds_per_image", "cca", "guided")
    recall = [run["main"]["cca"]["recall"] - run["main"]["guided"]["recall"] for run in seeds]
    return (
        f"{model}: without guidance CCA has {spread(over_guided, '.2f')} × the FID of the best guided base "
        f"(paper: {PAPER_OVER_GUIDED}) and {spread(over_base, '.2f')} × that of the unguided one "
        f"(paper: {PAPER_OVER_BASE}), closes {statistics.mean(gaps_closed(seeds)):.0%} of the gap, "
        f"has {spread(recall, '+.3f')} recall, and takes {spread(seconds, '.2f')} × the time."
    )


def model_section(model: str, seeds: list[dict], picture: str | None = None) -> list[str]:
    """Table and sentence of one model; ``seeds`` are its parts of one or several summaries."""
    kinds = [kind for kind in seeds[0]["main"] if all(kind in run["main"] for run in seeds)]
    lines = [table_line([run["main"][kind] for run in seeds]) for kind in kinds]
    for group in ("sweep", "temperature"):
        lines += [table_line(list(runs)) for runs in zip(*(run[group] for run in seeds))]
    text = [f"## {model}", "", verdict(model, seeds), ""]
    if picture:
        text += [
            f"![the same classes (columns) and random numbers from three ways of sampling]({picture})",
            "",
        ]
    titles = ["samples", *(title for _, title, _ in COLUMNS), "ms per image ↓"]
    return [*text, markdown_table(titles, lines), ""]


def write_pictures(folder: Path, summary: dict) -> None:
    for model, results in summary["models"].items():
        panels = []
        for kind in ("base", "guided", "cca"):
            figures = results["main"][kind]
            panels.append(
                (
                    f"{figures['label']}   (FID {figures['fid']:.2f})",
                    folder / "samples" / f"{figures['file']}.npz",
                )
            )
        sample_sheet(folder / f"{model}.png", panels, columns=10, lines=4, classes=10)
    fid_chart(folder / "fid.png", summary["models"])


def write_report(folder: Path, summary: dict) -> None:
    """report.md and the pictures of one run."""
    write_pictures(folder, summary)
    text = [
        "# Quickstart",
        "",
        f"{summary['samples']:,} samples of each kind against the 10,000 Fashion-MNIST test images; "
        f"features of the bundled network; seed {summary['seed']}, "
        f"{summary['threads']} CPU threads, {summary['wall_seconds']:.0f} s in all.",
        "",
    ]
    for model, results in summary["models"].items():
        text += model_section(model, [results], f"{model}.png")
    text += ["![FID over guidance scale](fid.png)", ""]
    atomic_write(folder / "report.md", lambda temporary: temporary.write_text("\n".join(text)))
    print(
        f"\n{(folder / 'report.md').read_text()}\n"
        f"report: {folder}/report.md, {folder}/summary.json, pictures beside them"
    )
