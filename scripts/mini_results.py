"""Mean and spread of several quickstart runs, as Markdown: what results/mini.md holds.

for seed in 0 1 2; do bash scripts/quickstart.sh --control --seed $seed --output runs/mini-$seed; done
python -m scripts.mini_results runs/mini-0 runs/mini-1 runs/mini-2 --output results/mini.md
"""

import datetime
import json
import platform
from pathlib import Path

from models.errors import UserError, run_command
from models.files import atomic_write
from models.options import Parser
from models.zoo import ZOO
from scripts.quickstart_report import gaps_closed, model_section, ratios
from scripts.report import spread


def aims(model: str, seeds: list[dict]) -> list[str]:
    """What was aimed at beside what was seen."""
    recipe = ZOO[model].recipes["cca"]
    controlled = [run for run in seeds if "sft" in run["main"]]
    lines = [
        f"best guided FID over unguided: {spread(ratios(seeds, 'fid', 'guided', 'base'), '.2f')} "
        "(wanted: at most 0.65)",
        f"CCA's FID without guidance over guided: {spread(ratios(seeds, 'fid', 'cca', 'guided'), '.2f')} "
        "(wanted: at most 1.10; aim: 1.00)",
        f"share of the gap from base to best guided that CCA closes: {spread(gaps_closed(seeds), '.2f')} "
        "(wanted: at least 0.90)",
    ]
    if controlled:
        lines.append(
            f"control over base: {spread(ratios(controlled, 'fid', 'sft', 'base'), '.2f')} "
            "(wanted: 0.90 to 1.10)"
        )
    lines += [
        f"seconds per image, CCA without guidance over guided base: "
        f"{spread(ratios(seeds, 'seconds_per_image', 'cca', 'guided'), '.2f')} (wanted: at most 0.75)",
        f"CCA: beta {recipe.beta:g}, lambda {recipe.lambda_:g}, learning rate {recipe.lr:g} "
        f"falling to {recipe.final_lr:g} of it, batch {recipe.batch_size}, "
        f"{recipe.epochs} epochs of 10,000 images",
    ]
    return [*(f"- {line}" for line in lines), ""]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, "scripts.mini_results")
    parser.add_argument("runs", nargs="+", type=Path, help="folders that the quickstart wrote")
    parser.add_argument(
        "--output", type=Path, default=Path("results/mini.md"), help="file to write (default %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in args.runs]
    except (OSError, ValueError) as error:
        raise UserError(f"runs: {error}") from None
    first = summaries[0]
    text = [
        "# The mini models",
        "",
        f"`bash scripts/quickstart.sh --control --seed SEED --output runs/mini-SEED` for the seeds "
        f"{', '.join(str(s['seed']) for s in summaries)}, then `python -m scripts.mini_results runs/mini-*`.",
        "",
        f"{datetime.date.today()}, {first['processor']}, {first['threads']} CPU threads, "
        f"Python {platform.python_version()}, torch {first['versions']['torch']}. "
        "Mean ± standard deviation over the seeds, which change the CCA run and the samples; one base per "
        f"model. {first['samples']:,} samples per row against the 10,000 test images, which no network has "
        "seen. How settings were chosen: [mini-notes.md](mini-notes.md).",
        "",
    ]
    for model in first["models"]:
        seeds = [summary["models"][model] for summary in summaries]
        text += [*model_section(model, seeds), *aims(model, seeds)]
    atomic_write(args.output, lambda temporary: temporary.write_text("\n".join(text)))


if __name__ == "__main__":
    run_command(main)
