"""Mean and spread of several quickstart runs, as Markdown.

    for seed in 0 1 2; do bash scripts/quickstart.sh --control --seed $seed --output runs/mini-$seed; done
    python -m scripts.mini_results runs/mini-0 runs/mini-1 runs/mini-2 --output results/mini.md

That is what results/mini.md holds.
"""

import datetime
import json
import platform
from pathlib import Path

from models.errors import UserError, run_command
from models.files import atomic_write
from models.options import Parser
from models.zoo import ZOO
from scripts.quickstart_report import MODELS, ROWS, gap_closed, results_table, spread, table_row

NOTES = Path(__file__).parent.parent / "results" / "mini-notes.md"


def model_section(model: str, runs: list[dict]) -> list[str]:
    rows = []
    controlled = [r for r in runs if "sft" in r]  # some runs may be without --control
    fewer = f", {len(controlled)} seed(s)" if len(controlled) < len(runs) else ""
    for kind, label in ROWS.items():
        having = controlled if kind == "sft" else runs
        scales = sorted({r[kind]["cfg_scale"] for r in runs}) if kind == "base_cfg" else []
        label += f" (scale {', '.join(map(str, scales))})" if scales else fewer if kind == "sft" else ""
        if having:
            rows.append(table_row(label, [r[kind] for r in having]))
    for scale in runs[0]["sweep"]:
        rows.append(table_row(f"base, guidance {scale}", [r["sweep"][scale] for r in runs]))
    for temperature in controlled[0]["temperature"] if controlled else ():
        label = f"control: base at temperature {temperature}{fewer}"
        rows.append(table_row(label, [r["temperature"][temperature] for r in controlled]))

    def ratio(name: str, a: str, b: str) -> str:
        return spread([r[a][name] / r[b][name] for r in runs if a in r], ".2f")

    guided, cca = ratio("fid", "base_cfg", "base"), ratio("fid", "cca", "base_cfg")
    closed = spread([gap_closed(r) for r in runs], ".2f")
    seconds = ratio("seconds_per_image", "cca", "base_cfg")
    recipe = ZOO[model].recipe()
    lines = [
        f"## {model}",
        "",
        *results_table(rows),
        f"- best guided FID over unguided: {guided} (wanted: below 0.80)",
        f"- CCA's FID without guidance over best guided: {cca} (aim: at most 1.00)",
        f"- share of the gap between base and best guided that CCA closes: {closed} (wanted: at least 0.90)",
    ]
    if controlled:
        control = ratio("fid", "sft", "base")
        lines.append(f"- control, plain maximum likelihood, over base: {control} (wanted: 0.90 to 1.10)")
    lines += [
        f"- seconds per image, CCA without guidance over guided base: {seconds} (wanted: at most 0.70)",
        f"- CCA: beta {recipe.beta:g}, lambda {recipe.lambda_:g}, "
        f"learning rate {recipe.lr:g} falling to {recipe.final_lr:g} of it, batch {recipe.batch_size}, "
        f"{recipe.epochs} epoch(s) of 10,000 images",
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
    seeds = ", ".join(str(s["seed"]) for s in summaries)
    seconds = ", ".join(str(round(s["wall_seconds"])) for s in summaries)
    lines = [
        "# The mini models",
        "",
        f"Command, for each of the seeds {seeds}:",
        "`bash scripts/quickstart.sh [--control] --seed SEED --output runs/mini-SEED`, "
        "then `python -m scripts.mini_results runs/mini-*`.",
        "",
        f"{datetime.date.today()}, {first['processor']}, {first['threads']} CPU threads, "
        f"Python {platform.python_version()}, torch {first['versions']['torch']}; "
        f"{seconds} s. Mean ± standard deviation over the seeds, which change the CCA run and the "
        f"samples; one base per model. {first['samples']:,} samples per row against the 10,000 test "
        "images, which no network has seen.",
        "",
    ]
    for model in MODELS:
        lines += model_section(model, [s[model] for s in summaries])
    lines += NOTES.read_text().splitlines() if NOTES.exists() else []
    atomic_write(args.output, lambda temporary: temporary.write_text("\n".join(lines) + "\n"))


if __name__ == "__main__":
    run_command(main)
