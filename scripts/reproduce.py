"""Train, sample and evaluate, and put the figures side by side in a report with pictures.

    bash scripts/quickstart.sh                            # both bundled models on a CPU, about 10 minutes
    bash scripts/reproduce_tradeoff.sh --mini             # a figure of the paper, on the bundled models
    bash scripts/reproduce_var.sh --data IMAGENET --reference imagenet256 --nproc 8
    bash scripts/reproduce_llamagen.sh --from-released --reference imagenet256 --models llamagen-l
    bash scripts/reproduce_ablation.sh --dry-run

Each of these runs `python -m scripts.reproduce EXPERIMENT`, EXPERIMENT being one of quickstart, tables,
var-tables, llamagen-tables, tradeoff, ablation, with-guidance, samples. The paper is arXiv 2410.09347. Steps
that are done are skipped: run the same command again to resume after an interruption.

What is run:
  --mini                 the bundled models and data instead of the published ones; the quickstart always
  --models MODEL ...     models of `python -m models` (default: those of the paper's table or figure)
  --data FOLDER|FILE     images to train on; the bundled models have their own
  --reference NAME|FILE  what samples are compared with, as in eval_fid.py; the bundled models have their own
  --features NAME        of eval_fid.py (default inception; --mini: mini)
  --num-samples N        images of each row, also --samples (default 50000; --mini: 5000)
  --seed N, --seeds N    the first seed (default 0), and how many; the report has mean and standard deviation
  --base FILE            weights of the base (default: the published or bundled ones); {model} and {seed} in
                         it are replaced, so that each seed may have a base of its own
  --dry-run              print every command and stop

Of single experiments:
  --control              quickstart: also plain maximum likelihood on the same images, and lower temperature
  --from-released        tables: the published CCA weights alone, no training
  --loss-options LOSS OPTIONS
                         ablation: options of a loss's training run, e.g. dpo "--beta 0.02 --lr 1e-6"
  --class N              samples: the class (default 207, golden retriever; --mini: 5, sandal)
  --guidance SCALE       samples: scale of the guided row (default: the published one; llamagen-mini: 2,
                         var-mini: 3)

Where it runs, and what it writes:
  --nproc N              processes of each machine (default: GPUs; --mini without GPUs: cores, 4 at most)
  --nnodes N, --rdzv-endpoint HOST:PORT
                         several machines (default 1), each with this command and one shared OUTPUT
  --output DIR           EXPERIMENT.md (quickstart: report.md), pictures, and in DIR or, of
                         further seeds, DIR/seed-N: runs, samples, results (default runs/quickstart,
                         runs/reproduce, runs/reproduce-mini)

--data, --reference, --output, --nproc, --nnodes and --rdzv-endpoint may be given as DATA, REFERENCE, OUTPUT,
NPROC, NNODES and RDZV_ENDPOINT in the environment.
"""

import importlib
import os
import re
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cca.cli.main import run_command
from cca.cli.output import Output
from cca.cli.parser import Parser, command_line, count, number
from cca.cli.plan import hidden_plans
from cca.data.image_folders import is_image_folder
from cca.distributed import Ranks
from cca.evaluation.references import find_reference
from cca.losses import LOSSES
from models import UserError, zoo_entry
from models.utils.files import read_json
from models.zoo.loading import build_model
from scripts.pixel_distance import pixel_distance
from scripts.recipes import EXPERIMENTS, SHEET, Row, Run, left_out, table_rows
from scripts.report import Figures, with_best_guided, write_report

# What --mini decides where no option does.
DEFAULTS = {"data": None, "reference": None, "features": "inception", "num_samples": 50_000}
MINI_DEFAULTS = {
    "data": "assets/fashion-mnist-train-10k.npz", "reference": "assets/fashion-mnist-test-10k.npz",
    "features": "mini", "num_samples": 5000,
}  # fmt: skip
MINI_BATCH = 128  # of sampling
# Options of a single experiment: where the parser keeps each, and of which it is.
ONLY_OF = {
    "--control": ("control", "quickstart"), "--loss-options": ("loss_options", "ablation"),
    "--class": ("label", "samples"), "--guidance": ("guidance", "samples"),
}  # fmt: skip


# fmt: off
def make_parser() -> Parser:
    parser = Parser(__doc__, "scripts.reproduce")
    parser.format_help = lambda: __doc__  # scripts/setup_environment.sh prints it as well, without PyTorch
    add, given = parser.add_argument, os.environ.get
    add("experiment", choices=EXPERIMENTS)
    add("--mini", action="store_true")
    add("--models", nargs="+", metavar="MODEL")
    add("--data", default=given("DATA"))
    add("--reference", default=given("REFERENCE"))
    add("--features")
    add("--num-samples", "--samples", type=count(100))
    add("--seed", type=count(0), default=0)
    add("--seeds", type=count(), default=1)
    add("--base", default="base")
    add("--dry-run", action="store_true")
    add("--control", action="store_true")
    add("--from-released", action="store_true")
    add("--loss-options", nargs=2, action="append", default=[], metavar=("LOSS", "OPTIONS"))
    add("--class", dest="label", type=count(0))
    add("--guidance", type=number(0))
    add("--nproc", type=count(), default=given("NPROC"))
    add("--nnodes", type=count(), default=given("NNODES", "1"))
    add("--rdzv-endpoint", default=given("RDZV_ENDPOINT", ""))
    add("--output", type=Path, default=given("OUTPUT"))
    return parser


# fmt: on


def resolve(args: Namespace) -> dict[str, list[Row]]:
    """Fill in what depends on other options, and return the rows of each model.

    Raises:
        UserError: something is missing, or does not go together.
    """
    experiment = EXPERIMENTS[args.experiment]
    args.mini = args.mini or args.experiment == "quickstart"
    args.models = args.models or list(experiment.mini if args.mini else experiment.models)
    for name in args.models:
        entry = zoo_entry(name)
        if entry.is_bundled and not args.mini:
            raise UserError(f"--models: {name} needs --mini")
        if args.mini and not entry.is_bundled:
            raise UserError(f"--models: {name} does not go with --mini")
    for loss, options in args.loss_options:
        if loss not in LOSSES:
            raise UserError(f"--loss-options: {loss!r} is not one of {', '.join(LOSSES)}")
        try:
            shlex.split(options)
        except ValueError as error:  # a quotation without its end
            raise UserError(f"--loss-options: {options!r} are no options ({error})") from None
    if args.from_released and (experiment.rows is not table_rows or args.mini):
        raise UserError("--from-released: goes with the published models' tables alone")
    for option, (name, wanted) in ONLY_OF.items():
        given = getattr(args, name)
        if not (given is None or given is False or given == []) and args.experiment != wanted:
            raise UserError(f"{option}: goes with {wanted} alone")
    if args.nnodes > 1 and args.mini:
        raise UserError("--nnodes: --mini runs on one machine")
    if args.nnodes > 1 and not args.rdzv_endpoint:
        raise UserError("--rdzv-endpoint: several machines need one, HOST:PORT of the first")
    for name, value in (MINI_DEFAULTS if args.mini else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    place = "reproduce-mini" if args.mini else "reproduce"
    args.output = args.output or Path("runs", "quickstart" if args.experiment == "quickstart" else place)
    Output(args.output, is_folder=True).check_place()
    if args.experiment == "samples":
        args.seeds = 1
        choose_class(args)
    rows = {name: experiment.rows(name, args) for name in args.models}
    check_inputs(args, any(isinstance(row.weights, Run) for every in rows.values() for row in every))
    return rows


def choose_class(args: Namespace) -> None:
    classes = min(build_model(name).num_classes for name in args.models)
    if args.label is None:
        args.label = 207 if classes == 1000 else min(5, classes - 1)
    if args.label >= classes:
        raise UserError(f"--class: {args.label} goes beyond 0 … {classes - 1}")


def check_inputs(args: Namespace, trains: bool) -> None:
    """Raise UserError for data or a reference that is needed and not there; a dry run gets a name for it."""
    for name, needed in (("data", trains), ("reference", args.experiment != "samples")):
        value = getattr(args, name)
        if needed and args.dry_run:
            setattr(args, name, value or name.upper())
        elif needed and value is None:
            raise UserError(f"--{name}: is required, or --mini for the bundled data")
        elif needed and not (
            (name == "reference" and find_reference(value))
            or Path(value).exists()
            or is_image_folder(Path(value))
        ):
            raise UserError(f"--{name}: {value}: no such file or folder")


def extent(rows: dict[str, list[Row]], args: Namespace) -> str:
    """Return a sentence on how much is trained and sampled."""
    every = [row for of_model in rows.values() for row in of_model]
    runs = {(row.model, row.weights) for row in every if isinstance(row.weights, Run)}
    trainings, samplings = args.seeds * len(runs), args.seeds * len(every)
    images = SHEET[0] * SHEET[1] if args.experiment == "samples" else args.num_samples
    return (
        f"{args.experiment}: {trainings:,} trainings and {samplings:,} samplings of {images:,} images, "
        f"{samplings * images:,} in all."
    )


class Launcher:
    """Runs commands: in this process and those beside it (``own``, --mini), or each as a torchrun of its own.

    Small commands need no start-up each. On several machines the script is started on each of them, in a
    folder that they share.
    """

    def __init__(self, args: Namespace):
        self.dry = args.dry_run
        self.own = Ranks() if args.mini else None
        self.main = self.own is None or self.own.is_main  # prints, and writes reports
        per_node = args.nproc or torch.cuda.device_count() or 1
        self.processes = self.own.world_size if self.own else per_node * args.nnodes
        several = f"--nnodes {args.nnodes} --rdzv-backend c10d --rdzv-endpoint {args.rdzv_endpoint}"
        self.options = f"--nproc_per_node {per_node} {several if args.nnodes > 1 else '--standalone'}"
        self.is_on_several, self.started = args.nnodes > 1, 0

    def run(self, module: str, arguments: list[str]) -> None:
        """Run the command of ``module``, such as "sample" or "scripts.extract_codes". Raises UserError."""
        line, self.started = command_line(module, arguments), self.started + 1
        # The machines run the same commands; each command meets under a name of its own.
        options = f"{self.options} --rdzv-id {self.started}" if self.is_on_several else self.options
        if self.main:
            print(f"$ python {line}" if self.own else f"$ torchrun {options} {line}", flush=True)
        if self.own and not self.dry:
            with hidden_plans():
                importlib.import_module(module).main(arguments)
            self.own.barrier()
        elif not self.dry:
            torchrun = [sys.executable, "-m", "torch.distributed.run"]
            if status := subprocess.call([*torchrun, *shlex.split(f"{options} {line}")]):
                raise UserError(f"{module} ended with status {status}; this script goes on from there")


@dataclass
class Pipeline:
    """Trains, samples and evaluates rows with one seed, in ``folder``.

    args: options of this command. called: outputs whose command was called, for other seeds too.
    """

    folder: Path
    seed: int
    launcher: Launcher
    args: Namespace
    called: set[Path] = field(default_factory=set)

    def make(self, path: Path, output: Path, module: str, *options: str) -> None:
        """Run the command that makes ``path``; it knows itself what is done already, with which options.

        Raises UserError where a signal stopped it.
        """
        if path not in self.called:
            self.called.add(path)
            self.launcher.run(module, [*options, "--output", str(output)])
            if not self.launcher.dry and not path.exists():
                raise UserError(f"{module} was stopped; this script goes on from there")

    def weights(self, row: Row) -> str:
        """Return what sample.py takes as --weights, trained if need be."""
        base = self.args.base.replace("{model}", row.model).replace("{seed}", str(self.seed))
        if isinstance(row.weights, str):
            return base if row.weights == "base" else row.weights
        backbone, folder = zoo_entry(row.model).backbone, self.folder / f"{row.model}-{row.weights.name}"
        path = folder / backbone.checkpoint_name
        fixed = ["--model", row.model, "--weights", base, "--seed", str(self.seed)]
        data = self.training_data(row.model)
        self.make(path, folder, backbone.training_command, *fixed, *data, *row.weights.options)
        return str(path)

    def training_data(self, model: str) -> list[str]:
        """Where a training command finds its data; codes, the same for all seeds, are extracted first."""
        entry, data = zoo_entry(model), ["--data", self.args.data]
        if not entry.backbone.trains_on_codes:
            return data
        codes = self.args.output / f"codes-{entry.tokenizer}-{entry.default_image_size}"
        self.make(codes / "header.json", codes, "scripts.extract_codes", "--model", model, *data)
        return ["--codes", str(codes)]

    def sample(self, row: Row) -> Path:
        path = self.folder / "samples" / f"{row.key}.npz"
        batch = ["--batch-size", str(MINI_BATCH)] if self.args.mini else []
        number = [] if "--num-samples" in row.sampling else ["--num-samples", str(self.args.num_samples)]
        fixed = ["--model", row.model, "--weights", self.weights(row), "--seed", str(self.seed)]
        self.make(path, path, "sample", *fixed, *batch, *number, *row.sampling)
        return path

    def evaluate(self, row: Row) -> Path:
        path, reference = self.folder / "results" / f"{row.key}.json", ["--reference", self.args.reference]
        options = ["--samples", str(self.sample(row)), *reference, "--features", self.args.features]
        self.make(path, path, "eval_fid", *options)
        return path

    def figures(self, row: Row) -> dict:
        """Return the metrics of a row, and the images per second of its sampling."""
        path = self.sample(row)
        figures = read_json(self.evaluate(row))["metrics"]
        figures["images_per_second"] = read_json(path.with_suffix(".json"))["images_per_second"]
        if all(getattr(self.args, name) == MINI_DEFAULTS[name] for name in ("data", "reference")):
            figures["pixel_fid"] = pixel_distance(path, self.args.reference, self.args.data)
        return figures

    def run(self, rows: list[Row], measured: bool = True) -> Figures:
        """Figures of all rows by key, if they are to be measured; trains all first: mistakes show early."""
        for row in rows:
            self.weights(row)
        for row in rows:
            self.evaluate(row) if measured else self.sample(row)
        return {row.key: self.figures(row) for row in rows if measured and not self.launcher.dry}


def run_with_torchrun(args: Namespace, argv: list[str]) -> None:
    """Replace this process by this command under torchrun, with --nproc processes (--mini alone)."""
    cores = os.cpu_count() or 1
    processes = args.nproc or torch.cuda.device_count() or min(cores, 4)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // processes, 1)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    rest = re.sub(r"--nproc[ =]\d+", "", shlex.join(argv))  # torchrun takes it for its own, abbreviated
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "scripts.reproduce", *shlex.split(rest)])


def main(argv: list[str] | None = None) -> None:
    began, argv = time.perf_counter(), sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    rows, quickstart = resolve(args), args.experiment == "quickstart"
    if args.mini and not args.dry_run and args.nproc != 1 and "RANK" not in os.environ:
        run_with_torchrun(args, argv)
    launcher, called = Launcher(args), set()
    if launcher.main:
        print(extent(rows, args), flush=True)
    folders = {args.seed + i: args.output / (f"seed-{args.seed + i}" if i else "") for i in range(args.seeds)}
    pipelines = [Pipeline(folder, seed, launcher, args, called) for seed, folder in folders.items()]
    results = {}
    for model, every in rows.items():
        if args.experiment == "ablation" and launcher.main:
            print(left_out(model, every), flush=True)
        seeds = [pipeline.run(every, args.experiment != "samples") for pipeline in pipelines]
        if quickstart and not launcher.dry:
            every = with_best_guided(every, seeds)
        results[model] = every, seeds
    if launcher.main and not launcher.dry:
        write_report(args, results, launcher.processes, time.perf_counter() - began)


if __name__ == "__main__":
    run_command(main)
