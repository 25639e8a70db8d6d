"""Mean and spread of several quickstart runs, as Markdown: what results/mini.md holds.

for seed in 0 1 2; do bash scripts/quickstart.sh --control --seed $seed --output runs/mini-$seed; done
python -m scripts.mini_results runs/mini-0 runs/mini-1 runs/mini-2 --output results/mini.md
"""

import datetime
import json
import platform
import statistics
from pathlib import Path

from cca.errors import UserError, run_command
from cca.options import Parser
from models.checkpoints import atomic_write
from models.zoo import ZOO
from scripts.quickstart_report import COLUMNS, MODELS, ROWS, gap_closed

NOTES = Path(__file__).parent.parent / "results" / "mini-notes.md"


def spread(values: list[float], form: str, factor: float = 1.0) -> str:
    """Mean ± sample standard deviation."""
    values = [factor * v for v in values]
    return (
        f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"
        if len(values) > 1
        else f"{values[0]:{form}}"
    )


def row(label: str, runs: list[dict]) -> str:
    cells = [
        spread([r[name] for r in runs], form, 1000 if name == "seconds_per_image" else 1)
        if runs[0].get(name) is not None
        else "–"
        for name, _, form in COLUMNS
    ]
    return f"| {label} | {' | '.join(cells)} |"


def model_section(model: str, runs: list[dict]) -> list[str]:
    lines = [
        f"## {model}",
        "",
        "| samples | " + " | ".join(title for _, title, _ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    controlled = [r for r in runs if "sft" in r]  # some runs may be without --control
    fewer = f", {len(controlled)} seed(s)" if len(controlled) < len(runs) else ""
    for kind, label in ROWS.items():
        having = controlled if kind == "sft" else runs
        scales = sorted({r[kind]["cfg_scale"] for r in runs}) if kind == "base_cfg" else []
        label += f" (scale {', '.join(map(str, scales))})" if scales else fewer if kind == "sft" else ""
        if having:
            lines.append(row(label, [r[kind] for r in having]))
    for scale in runs[0]["sweep"]:
        lines.append(row(f"base, guidance {scale}", [r["sweep"][scale] for r in runs]))
    for temperature in controlled[0]["temperature"] if controlled else ():
        lines.append(
            row(
                f"control: base at temperature {temperature}{fewer}",
                [r["temperature"][temperature] for r in controlled],
            )
        )

    def ratios(name: str, a: str, b: str) -> list[float]:
        return [r[a][name] / r[b][name] for r in runs if a in r]

    recipe = ZOO[model].recipe
    lines += [
        "",
        f"- best guided FID over unguided: {spread(ratios('fid', 'base_cfg', 'base'), '.2f')} (wanted: below 0.80)",
        f"- CCA's FID without guidance over best guided: {spread(ratios('fid', 'cca', 'base_cfg'), '.2f')} (aim: at most 1.00)",
        f"- share of the gap between base and best guided that CCA closes: {spread([gap_closed(r) for r in runs], '.2f')} (wanted: at least 0.90)",
    ]
    if controlled:
        lines.append(
            f"- control, plain maximum likelihood, over base: {spread(ratios('fid', 'sft', 'base'), '.2f')} (wanted: 0.90 to 1.10)"
        )
    lines += [
        f"- seconds per image, CCA without guidance over guided base: {spread(ratios('seconds_per_image', 'cca', 'base_cfg'), '.2f')} (wanted: at most 0.70)",
        f"- CCA: beta {recipe.beta:g}, lambda {recipe.lam:g}, learning rate {recipe.lr:g} falling to {recipe.final_lr:g} of it, batch {recipe.batch_size}, {recipe.epochs} epoch(s) of 10,000 images",
        "",
    ]
    return lines


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that the quickstart wrote")
    parser.add_argument(
        "--output", type=Path, default=Path("results/mini.md"), help="file to write (default %(default)s)"
    )
    args = parser.parse_args()
    try:
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in args.runs]
    except (OSError, ValueError) as error:
        raise UserError(f"runs: {error}") from None
    first = summaries[0]
    lines = [
        "# The mini models",
        "",
        f"Command, for each of the seeds {', '.join(str(s['seed']) for s in summaries)}:",
        "`bash scripts/quickstart.sh [--control] --seed SEED --output runs/mini-SEED`, then `python -m scripts.mini_results runs/mini-*`.",
        "",
        f"{datetime.date.today()}, {first['processor']}, {first['threads']} CPU threads, Python {platform.python_version()}, torch {first['versions']['torch']}; "
        f"{', '.join(str(round(s['wall_seconds'])) for s in summaries)} s. Mean ± standard deviation over the seeds, which change the CCA run and the samples; "
        f"one base per model. {first['samples']:,} samples per row against the 10,000 test images, which no network has seen.",
        "",
    ]
    for model in MODELS:
        lines += model_section(model, [s[model] for s in summaries])
    lines += NOTES.read_text().splitlines() if NOTES.exists() else []
    atomic_write(args.output, lambda temporary: temporary.write_text("\n".join(lines) + "\n"))


if __name__ == "__main__":
    run_command(main)
