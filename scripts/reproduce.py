"""The paper's tables and figures (arXiv 2410.09347): train, sample, evaluate, put figures side by side.

    bash scripts/reproduce_tradeoff.sh --mini                     # the bundled models, on a CPU
    bash scripts/reproduce_var.sh --data imagenet --reference imagenet256 --nproc 8
    bash scripts/reproduce_llamagen.sh --from-released --reference imagenet256 --models llamagen-l
    bash scripts/reproduce_ablation.sh --dry-run                  # prints every command, and stops

Steps that are done are skipped, so the same command goes on after an interruption. --data, --reference,
--output, --nproc, --nnodes and --rdzv-endpoint may be given as DATA, REFERENCE, OUTPUT, NPROC, NNODES and
RDZV_ENDPOINT in the environment. Writes OUTPUT/EXPERIMENT.md, and a picture where the experiment has one.
"""

import argparse
import os
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from cca.distributed import Processes
from cca.training.losses import LOSSES
from models import ZOO, UserError, zoo_entry
from models.errors import run_command
from models.files import atomic_write
from models.options import Parser, count, number
from scripts import experiments as e
from scripts.pipeline import InProcess, Launcher, Pipeline, Row, Torchrun
from scripts.report import (
    distances_to_curve,
    figures_table,
    pairs,
    provenance,
    sample_sheet,
    spread,
    tradeoff_chart,
)

MINI_SAMPLES, MINI_BATCH = 5000, 128
VAR_TABLE, LLAMAGEN_TABLE = ("var-d16", "var-d20", "var-d24", "var-d30"), (
    "llamagen-b", "llamagen-l", "llamagen-xl", "llamagen-xxl", "llamagen-3b",
)  # fmt: skip
FULL_MODELS = {
    "var-tables": VAR_TABLE,
    "llamagen-tables": LLAMAGEN_TABLE,
    "tradeoff": ("llamagen-l", "var-d24"),
    "ablation": ("llamagen-l", "var-d24"),
    "with-guidance": LLAMAGEN_TABLE,
    "samples": ("llamagen-l", "var-d24"),
}
MINI_MODELS = {"var-tables": ("var-mini",), "llamagen-tables": ("llamagen-mini",)}


def make_parser() -> Parser:
    parser = Parser(__doc__, "scripts.reproduce")
    add, given = parser.add_argument, os.environ.get
    add("experiment", choices=FULL_MODELS, help="which table or figure; the scripts fill this in")
    add("--mini", action="store_true", help="the bundled models and data instead of the published ones")
    add("--models", nargs="+", metavar="MODEL", help="models (default: those of the paper's table or figure)")
    add("--data", default=given("DATA"), metavar="IMAGENET", help="folder of class folders to train on")
    add(
        "--reference",
        default=given("REFERENCE"),
        metavar="imagenet256|FILE.npz",
        help="what samples are held against",
    )
    add(
        "--output",
        type=Path,
        default=given("OUTPUT"),
        metavar="DIR",
        help="default runs/reproduce or runs/reproduce-mini",
    )
    add(
        "--from-released",
        action="store_true",
        help="tables: the published CCA weights alone, no training",
    )
    add("--seeds", type=count(), default=1, help="repeat everything with so many seeds from 0 (default 1)")
    add("--num-samples", type=count(100), help="images of each row (default 50000; --mini: 5000)")
    add("--loss-options", nargs=2, action="append", default=[], metavar=("LOSS", "OPTIONS"),
        help='ablation: options of a loss\'s training run, e.g. dpo "--beta 0.02 --lr 1e-6"')  # fmt: skip
    add(
        "--class",
        dest="label",
        type=count(0),
        help="samples: the class (default 207, golden retriever; --mini: 5, sandal)",
    )
    add(
        "--guidance",
        type=number(0),
        help="samples: scale of the guided row (default: the published one; --mini: 2)",
    )
    add(
        "--nproc",
        type=count(),
        default=given("NPROC"),
        help="processes of each machine (default: GPUs; --mini: cores, 4 at most)",
    )
    add("--nnodes", type=count(), default=given("NNODES", "1"), help="machines (default 1)")
    add(
        "--rdzv-endpoint",
        default=given("RDZV_ENDPOINT", ""),
        metavar="HOST:PORT",
        help="rendezvous of several machines",
    )
    add("--dry-run", action="store_true", help="print every command and stop")
    return parser


def settings(args: argparse.Namespace) -> None:
    """Fill in what depends on --mini; raises UserError for what is missing or does not go together."""
    names = MINI_MODELS.get(args.experiment, tuple(e.MINI)) if args.mini else FULL_MODELS[args.experiment]
    args.models = args.models or list(names)
    for name in args.models:
        zoo_entry(name)
        if e.is_mini(name) != args.mini:
            raise UserError(f"--models: {name} {'needs' if e.is_mini(name) else 'does not go with'} --mini")
    for loss, _ in args.loss_options:
        if loss not in LOSSES:
            raise UserError(f"--loss-options: {loss!r} is not one of {', '.join(LOSSES)}")
    if args.from_released and args.experiment not in MINI_MODELS:
        raise UserError("--from-released: goes with reproduce_var.sh and reproduce_llamagen.sh alone")
    if args.from_released and args.mini:
        raise UserError("--from-released: no CCA weights of the bundled models are released")
    args.data = args.data or (e.BUNDLED_TRAIN if args.mini else None)
    args.reference = args.reference or (e.BUNDLED_REFERENCE if args.mini else None)
    args.output = Path(args.output or ("runs/reproduce-mini" if args.mini else "runs/reproduce"))
    args.num_samples = args.num_samples or (MINI_SAMPLES if args.mini else 50_000)
    if args.label is None:
        args.label = 5 if args.mini else 207
    classes = min(zoo_entry(name).transformer.num_classes for name in args.models)
    if args.label >= classes:
        raise UserError(f"--class: {args.label} goes beyond 0 … {classes - 1}")
    needs = {"data": not args.from_released, "reference": args.experiment != "samples"}
    for name, needed in needs.items():
        option, value = f"--{name}", getattr(args, name)
        if needed and value is None:
            if not args.dry_run:
                raise UserError(f"{option}: is required, or --mini for the bundled data")
            setattr(args, name, name.upper())
        elif needed and not args.dry_run and not Path(value).exists():
            raise UserError(f"{option}: {value}: no such file or folder")
    if args.nnodes > 1 and not args.rdzv_endpoint:
        raise UserError("--rdzv-endpoint: several machines need one, HOST:PORT of the first")


def launcher(args: argparse.Namespace) -> Launcher:
    if args.mini:
        return InProcess(Processes(), args.dry_run)
    per_node = args.nproc or torch.cuda.device_count() or 1
    return Torchrun(per_node, args.nnodes, args.rdzv_endpoint, args.dry_run)


def series(rows: list[Row], seeds: list[dict], curve: list[Row]) -> str:
    """One sentence: how far CCA's points lie from guidance's curve, in FID at equal inception score."""
    distances = [distances_to_curve(pairs(curve, run), pairs(rows, run)) for run in seeds]
    means = [statistics.mean(values) for values in distances if values]
    if not means:
        return "No point of CCA lies within the inception scores of the guidance curve."
    inside = " or ".join(str(n) for n in sorted({len(values) for values in distances}))
    return (
        f"CCA's FID less that of guidance at equal inception score: {spread(means, '+.3f')} "
        f"(mean of the {inside} of {len(rows)} points within the curve's range; 0 or below: as good)."
    )


def in_order(rows: list[tuple[float, Row]]) -> list[Row]:
    """Rows by the value that was varied."""
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


class Experiment:
    """Runs one experiment for all seeds and writes its report."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.launcher = args, launcher(args)
        self.sections: list[str] = []
        self.pipelines = [
            Pipeline(
                folder=args.output / f"seed-{seed}", shared=args.output, launcher=self.launcher,
                data=args.data, reference=args.reference, features="mini" if args.mini else "inception",
                num_samples=args.num_samples, seed=seed,
                batch_size=MINI_BATCH if args.mini else None,
            )
            for seed in range(args.seeds)
        ]  # fmt: skip
        for pipeline in self.pipelines:
            pipeline.planned = self.pipelines[0].planned  # codes are shared by all seeds
            pipeline.claim()

    def run(self, rows: list[Row]) -> list[dict]:
        """Figures of the rows, one dictionary a seed; none in a dry run."""
        found = [pipeline.run(rows) for pipeline in self.pipelines]
        return [] if self.launcher.dry else found

    def table(self, model: str, rows: list[Row], seeds: list[dict], *remarks: str) -> None:
        self.sections += [f"## {model}", figures_table(rows, seeds), *remarks]

    def tables(self) -> None:
        for model in self.args.models:
            rows = e.table_rows(model, self.args.from_released)
            if seeds := self.run(rows):
                self.table(model, rows, seeds)

    def ablation(self) -> None:
        options = {loss: tuple(shlex.split(text)) for loss, text in self.args.loss_options}
        for model in self.args.models:
            left_out = [loss for loss in LOSSES if loss not in options and loss not in ZOO[model].recipes]
            remark = ""
            if left_out:
                needed = (f"--{name.rstrip('_')} 0.02" for name in LOSSES[left_out[0]].hyperparameters)
                example = f"{left_out[0]} '{' '.join(needed)} --lr 1e-6'"
                remark = (
                    f"Left out: {', '.join(left_out)}, whose beta, lambda and learning rate were not "
                    f"published for {model}; give them, as in --loss-options {example}."
                )
            if remark and self.launcher.main:
                print(remark, flush=True)
            rows = e.ablation_rows(model, options)
            if seeds := self.run(rows):
                fids = {row.label: statistics.mean(run[row.key]["fid"] for run in seeds) for row in rows}
                order = " < ".join(label.partition(",")[0] for label in sorted(fids, key=lambda k: fids[k]))
                remarks = [f"Order by FID: {order}. {e.paper_order(model)}", remark]
                self.table(model, rows, seeds, *filter(None, remarks))

    def tradeoff(self) -> None:
        panels, found = {}, []
        for model in self.args.models:
            base, guided = e.base_row(model), e.guided_rows(model)
            recipe, control = (
                e.trained_row(model, e.CCA, "CCA, the recipe"),
                e.trained_row(model, e.CONTROL, "control: maximum likelihood"),
            )
            lambdas, betas = e.lambda_rows(model), e.beta_rows(model)
            rows = [base, *guided, recipe, *lambdas, *betas, control]
            if seeds := self.run(rows):
                curve = [base, *guided]
                remarks = [
                    f"lambda varied. {series([recipe, *lambdas], seeds, curve)}",
                    f"beta varied. {series([recipe, *betas], seeds, curve)}",
                ]
                self.table(model, rows, seeds, *remarks)
                settings, varied = ZOO[model].recipes["cca"], e.sweeps(model)
                over_lambda = [(settings.lambda_, recipe), *zip(varied.lambdas, lambdas)]
                over_beta = [*zip(varied.betas, betas)]
                if varied.beta_lambda is None:
                    over_beta.append((settings.beta, recipe))
                panels[model] = {
                    "base, guidance over its scale": (curve, "o-"),
                    "CCA, no guidance, over lambda": (in_order(over_lambda), "s--"),
                    "CCA, no guidance, over beta": (in_order(over_beta), "^--"),
                    "CCA, the recipe": ([recipe], "*"),
                    "control: maximum likelihood": ([control], "x"),
                }
                found.append(seeds)
        if found:
            self.chart(panels, found)

    def with_guidance(self) -> None:
        panels, found = {}, []
        for model in self.args.models:
            base, guided, cca = e.base_row(model), e.guided_rows(model), e.with_guidance_rows(model)
            rows = [base, *guided, *cca]
            if seeds := self.run(rows):
                best = [
                    statistics.mean(min(run[row.key]["fid"] for row in some) for run in seeds)
                    for some in (guided, cca)
                ]
                remark = f"Best FID: guidance alone {best[0]:.3f}, CCA with guidance on top {best[1]:.3f}."
                self.table(model, rows, seeds, remark)
                panels[model] = {
                    "base, guidance": ([base, *guided], "o-"),
                    "CCA with guidance on top": (cca, "s-"),
                }
                found.append(seeds)
        if found:
            self.chart(panels, found)

    def samples(self) -> None:
        columns, lines = 6, 4
        for model in self.args.models:
            published = ZOO[model].published
            scale = self.args.guidance or (published.cfg_scale if published else 2.0)
            weights = e.CCA if self.args.mini else "cca"
            rows = e.same_noise_rows(model, self.args.label, columns * lines, weights, scale)
            files = [self.pipelines[0].sample(row) for row in rows]
            if self.launcher.main and not self.launcher.dry:
                name = f"samples-{model}-class{self.args.label}.png"
                panels = [(row.label, file) for row, file in zip(rows, files)]
                sample_sheet(self.args.output / name, panels, columns, lines)
                self.sections += [
                    f"## {model}",
                    f"Class {self.args.label}, the same random numbers in each panel.",
                    f"![samples]({name})",
                ]

    def chart(self, panels: dict, found: list[list[dict]]) -> None:
        """``found``: for each model the figures of all seeds."""
        if self.launcher.main:
            name = f"{self.args.experiment}.png"
            seeds = [{key: figures for run in runs for key, figures in run.items()} for runs in zip(*found)]
            tradeoff_chart(self.args.output / name, panels, seeds)
            self.sections.append(f"![FID over inception score]({name})")

    def write(self, argv: list[str]) -> None:
        """OUTPUT/EXPERIMENT.md."""
        if not self.sections or not self.launcher.main:
            return
        name = f"scripts/reproduce_{self.args.experiment.removesuffix('-tables').replace('-', '_')}.sh"
        script = f"bash {name} {shlex.join(argv)}".strip()
        title = f"# {self.args.experiment.replace('-', ' ').capitalize()}"
        head = [title, provenance(script, range(self.args.seeds))]
        if self.args.experiment != "samples":
            reference = Path(self.args.reference).name
            head.append(f"{self.args.num_samples:,} samples per row against {reference}.")
        text = "\n\n".join([*head, *self.sections]) + "\n"
        path = self.args.output / f"{self.args.experiment}.md"
        atomic_write(path, lambda temporary: temporary.write_text(text))
        print(f"\n{text}\nwritten to {path}")


RUN: dict[str, Callable[[Experiment], None]] = {
    "var-tables": Experiment.tables,
    "llamagen-tables": Experiment.tables,
    "tradeoff": Experiment.tradeoff,
    "ablation": Experiment.ablation,
    "with-guidance": Experiment.with_guidance,
    "samples": Experiment.samples,
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    settings(args)
    if args.mini and not args.dry_run and "RANK" not in os.environ:
        cores = os.cpu_count() or 1
        processes = args.nproc or min(cores, 4)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // processes, 1)))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        given = argv.index("--nproc") if "--nproc" in argv else len(argv)
        rest = argv[:given] + argv[given + 2 :]  # torchrun takes it for its own, abbreviated
        os.execv(sys.executable, [sys.executable, *torchrun, "-m", "scripts.reproduce", *rest])
    experiment = Experiment(args)
    RUN[args.experiment](experiment)
    experiment.write(argv[1:])


if __name__ == "__main__":
    run_command(main)
