"""Train, sample and evaluate, then write a report that compares the figures, with pictures.

    bash scripts/quickstart.sh                            # both bundled models on a CPU, about 10 minutes
    bash scripts/reproduce_tradeoff.sh --mini             # a figure of the paper, with the bundled models
    bash scripts/reproduce_var.sh --data IMAGENET --reference imagenet256 --nproc 8
    bash scripts/reproduce_llamagen.sh --from-released --reference imagenet256 --models llamagen-l
    bash scripts/reproduce_ablation.sh --dry-run

Each of these scripts runs `python -m scripts.reproduce EXPERIMENT`, where EXPERIMENT is quickstart, tables,
var-tables, llamagen-tables, tradeoff, ablation, with-guidance or samples. The paper is arXiv 2410.09347. Run
the same command again to resume after an interruption: finished steps are skipped.

model:
  --mini                 use the bundled models and data (default: off; quickstart: always on)
  --models MODEL ...     model names; `python -m models` lists them (default: those of the paper's table or
                         figure)
  --base FILE            weights of the base, in which {model} and {seed} are replaced, so that each seed can
                         have its own (default: the published weights; --mini: the bundled ones)

data:
  --data FOLDER|FILE     images to train on (required; with --mini the default is the bundled file)
  --reference NAME|FILE  reference that samples are compared with, as in eval_fid.py (required; with --mini
                         the default is the bundled file)
  --num-samples N        images per row, at least 100; --samples is the same (default: 50000; --mini: 5000)
  --class N              experiment samples: number of the class (default: 207, golden retriever; --mini: 5,
                         sandal)

method:
  --control              quickstart: add two controls, plain maximum likelihood on the same images and a lower
                         temperature (default: off)
  --from-released        tables: use only the published CCA weights, without training (default: off)
  --loss-options LOSS OPTIONS
                         ablation: options of the training run with this loss, such as
                         dpo "--beta 0.02 --lr 1e-6"; can be repeated (default: the published values)
  --guidance SCALE       experiment samples: guidance scale of the guided row (default: the published one;
                         llamagen-mini: 2; var-mini: 3)
  --features NAME        feature extractor, as in eval_fid.py (default: inception; --mini: mini)
  --seed N               first random seed (default: 0)
  --seeds N              number of seeds; the report has mean and standard deviation over them (default: 1;
                         experiment samples: always 1)

performance:
  --nproc N              ranks (default: number of GPUs; --mini without GPUs: number of cores, at most 4)

output:
  --output DIR           folder to write: EXPERIMENT.md (quickstart: report.md), pictures, runs, samples and
                         results; further seeds go to DIR/seed-N (default: runs/reproduce; --mini:
                         runs/reproduce-mini; quickstart: runs/quickstart)
  --dry-run              print every command and exit
  --version              print the version and exit
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
from itertools import product
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
from models.zoo.hub import HUB
from models.zoo.loading import build_model
from scripts.pixel_distance import pixel_distance
from scripts.recipes import EXPERIMENTS, SHEET, Row, Run, left_out, table_rows
from scripts.report import Figures, with_best_guided, write_report

# Defaults of options that depend on --mini.
DEFAULTS = {"data": None, "reference": None, "features": "inception", "num_samples": 50_000}
MINI_DEFAULTS = {
    "data": "assets/fashion-mnist-train-10k.npz", "reference": "assets/fashion-mnist-test-10k.npz",
    "features": "mini", "num_samples": 5000,
}  # fmt: skip
MINI_BATCH = 128  # images per batch of sampling, with --mini
# Options of a single experiment: the attribute of the parsed options, and the experiment.
ONLY_OF = {
    "--control": ("control", "quickstart"), "--loss-options": ("loss_options", "ablation"),
    "--class": ("label", "samples"), "--guidance": ("guidance", "samples"),
}  # fmt: skip


# fmt: off
def make_parser() -> Parser:
    parser = Parser(__doc__, "scripts.reproduce")
    parser.format_help = lambda: __doc__  # scripts/setup_environment.sh prints the same, without PyTorch
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS)
    add("--mini", action="store_true")
    add("--models", nargs="+", metavar="MODEL")
    add("--data")
    add("--reference")
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
    add("--nproc", type=count())
    add("--output", type=Path)
    return parser


# fmt: on


def set_defaults(args: Namespace) -> None:
    """Set the options that depend on other options."""
    experiment, is_quickstart = EXPERIMENTS[args.experiment], args.experiment == "quickstart"
    args.mini = args.mini or is_quickstart
    args.models = args.models or list(experiment.mini if args.mini else experiment.models)
    for name, value in (MINI_DEFAULTS if args.mini else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    place = "reproduce-mini" if args.mini else "reproduce"
    args.output = args.output or Path("runs", "quickstart" if is_quickstart else place)


def check_options(args: Namespace) -> None:
    """Raise UserError for options that do not go together."""
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
        except ValueError as error:  # an unclosed quotation mark
            raise UserError(f"--loss-options: {options!r} cannot be split into options ({error})") from None
    if args.from_released and (EXPERIMENTS[args.experiment].rows is not table_rows or args.mini):
        raise UserError("--from-released: applies only to tables of published models, without --mini")
    for option, (name, owner) in ONLY_OF.items():
        value = getattr(args, name)
        if not (value is None or value is False or value == []) and args.experiment != owner:
            raise UserError(f"{option}: applies only to the experiment {owner}")
    if args.experiment == "samples" and args.seeds > 1:
        raise UserError(f"--seeds: must be 1 for the experiment samples, not {args.seeds}")
    Output(args.output, is_folder=True).check_place()


def resolve(args: Namespace) -> dict[str, list[Row]]:
    """Set the defaults, check the options and the inputs, and return the rows of each model.

    Raises:
        UserError: an option or an input is missing, or options do not go together.
    """
    set_defaults(args)
    check_options(args)
    if args.experiment == "samples":
        choose_class(args)
    rows = {name: EXPERIMENTS[args.experiment].rows(name, args) for name in args.models}
    check_inputs(args, any(isinstance(row.weights, Run) for of_model in rows.values() for row in of_model))
    return rows


def choose_class(args: Namespace) -> None:
    """Set ``args.label``, the class that is sampled. Raises UserError if a model does not have it."""
    classes = min(build_model(name).num_classes for name in args.models)
    if args.label is None:
        args.label = 207 if classes == 1000 else min(5, classes - 1)
    if args.label >= classes:
        raise UserError(f"--class: {args.label} goes beyond 0 … {classes - 1}")


def check_inputs(args: Namespace, trains: bool) -> None:
    """Check that the bases exist, and the training data and the reference, if the experiment uses them.

    A dry run needs none of them; data and reference become the placeholders DATA and REFERENCE. Raises
    UserError.
    """
    for seed, name in product(range(args.seed, args.seed + args.seeds), args.models):
        base = base_weights(args, name, seed)
        is_file = base != "base" and not base.startswith(HUB)
        if is_file and not args.dry_run and not Path(base.removesuffix(":ema")).exists():
            raise UserError(f"--base: {base}: no such file")
    for name, is_used in (("data", trains), ("reference", args.experiment != "samples")):
        value = getattr(args, name)
        if is_used and args.dry_run:
            setattr(args, name, value or name.upper())
        elif is_used and value is None:
            raise UserError(f"--{name}: is required, or use --mini for the bundled data")
        elif is_used and not (
            (name == "reference" and find_reference(value))
            or Path(value).exists()
            or is_image_folder(Path(value))
        ):
            raise UserError(f"--{name}: {value}: no such file or folder")


def base_weights(args: Namespace, model: str, seed: int) -> str:
    """Return --weights of the base of a model for one seed."""
    return args.base.replace("{model}", model).replace("{seed}", str(seed))


def extent(rows: dict[str, list[Row]], args: Namespace) -> str:
    """Return a sentence that says how much is trained and sampled."""
    all_rows = [row for of_model in rows.values() for row in of_model]
    runs = {(row.model, row.weights) for row in all_rows if isinstance(row.weights, Run)}
    trainings, samplings = args.seeds * len(runs), args.seeds * len(all_rows)
    images = SHEET[0] * SHEET[1] if args.experiment == "samples" else args.num_samples
    return (
        f"{args.experiment}: {trainings:,} trainings and {samplings:,} samplings of {images:,} images, "
        f"{samplings * images:,} in all."
    )


class Launcher:
    """Runs commands: with --mini on the ranks of this run (``own``), else each under a torchrun of its own.

    With --mini the commands are short, and starting each alone would take longer than the work.
    """

    def __init__(self, args: Namespace):
        self.dry = args.dry_run
        self.own = Ranks() if args.mini else None
        self.main = self.own is None or self.own.is_main  # prints, and writes reports
        self.world_size = self.own.world_size if self.own else args.nproc or torch.cuda.device_count() or 1

    def run(self, module: str, arguments: list[str]) -> None:
        """Run the command of ``module``, such as "sample" or "scripts.extract_codes". Raises UserError."""
        line, options = command_line(module, arguments), f"--standalone --nproc_per_node {self.world_size}"
        if self.main:
            print(f"$ python {line}" if self.own else f"$ torchrun {options} {line}", flush=True)
        if self.own and not self.dry:
            with hidden_plans():
                importlib.import_module(module).main(arguments)
            self.own.barrier()
        elif not self.dry:
            torchrun = [sys.executable, "-m", "torch.distributed.run"]
            if status := subprocess.call([*torchrun, *shlex.split(f"{options} {line}")]):
                raise UserError(f"{module} ended with status {status}; run this command again to resume")


@dataclass
class Pipeline:
    """Trains, samples and evaluates rows with one seed, in ``folder``.

    args: options of this command. called: outputs whose command was run already, by any seed.
    """

    folder: Path
    seed: int
    launcher: Launcher
    args: Namespace
    called: set[Path] = field(default_factory=set)

    def make(self, path: Path, output: Path, module: str, *options: str) -> None:
        """Run the command that makes ``path``, unless it was run already; the command resumes by itself.

        Raises UserError if a signal stopped it.
        """
        if path not in self.called:
            self.called.add(path)
            self.launcher.run(module, [*options, "--output", str(output)])
            if not self.launcher.dry and not path.exists():
                raise UserError(f"{module} was stopped; run this command again to resume")

    def weights(self, row: Row) -> str:
        """Return --weights of sample.py for a row, and train the run first if there is one."""
        base = base_weights(self.args, row.model, self.seed)
        if isinstance(row.weights, str):
            return base if row.weights == "base" else row.weights
        backbone, folder = zoo_entry(row.model).backbone, self.folder / f"{row.model}-{row.weights.name}"
        path = folder / backbone.checkpoint_name
        fixed = ["--model", row.model, "--weights", base, "--seed", str(self.seed)]
        data = self.training_data(row.model)
        self.make(path, folder, backbone.training_command, *fixed, *data, *row.weights.options)
        return str(path)

    def training_data(self, model: str) -> list[str]:
        """Return the data options of the training command; codes are extracted first, once for all seeds."""
        entry, data = zoo_entry(model), ["--data", self.args.data]
        if not entry.backbone.trains_on_codes:
            return data
        codes = self.args.output / f"codes-{entry.tokenizer}-{entry.default_image_size}"
        self.make(codes / "header.json", codes, "scripts.extract_codes", "--model", model, *data)
        return ["--codes", str(codes)]

    def sample(self, row: Row) -> Path:
        """Sample the images of a row, and return their file."""
        path = self.folder / "samples" / f"{row.key}.npz"
        batch = ["--batch-size", str(MINI_BATCH)] if self.args.mini else []
        number = [] if "--num-samples" in row.sampling else ["--num-samples", str(self.args.num_samples)]
        fixed = ["--model", row.model, "--weights", self.weights(row), "--seed", str(self.seed)]
        self.make(path, path, "sample", *fixed, *batch, *number, *row.sampling)
        return path

    def evaluate(self, row: Row) -> Path:
        """Evaluate the samples of a row, and return the file of results."""
        path, reference = self.folder / "results" / f"{row.key}.json", ["--reference", self.args.reference]
        options = ["--samples", str(self.sample(row)), *reference, "--features", self.args.features]
        self.make(path, path, "eval_fid", *options)
        return path

    def figures(self, row: Row) -> dict:
        """Return the metrics of a row, and its sampling speed in images per second."""
        path = self.sample(row)
        figures = read_json(self.evaluate(row))["metrics"]
        figures["images_per_second"] = read_json(path.with_suffix(".json"))["images_per_second"]
        if all(getattr(self.args, name) == MINI_DEFAULTS[name] for name in ("data", "reference")):
            figures["pixel_fid"] = pixel_distance(path, self.args.reference, self.args.data)
        return figures

    def run(self, rows: list[Row], evaluates: bool = True) -> Figures:
        """Train, sample and evaluate all rows, and return their figures by key.

        Without ``evaluates``, and in a dry run, there are no figures. All training comes first, so that
        errors in its options show early.
        """
        for row in rows:
            self.weights(row)
        for row in rows:
            self.evaluate(row) if evaluates else self.sample(row)
        return {row.key: self.figures(row) for row in rows if evaluates and not self.launcher.dry}


def run_with_torchrun(args: Namespace, argv: list[str]) -> None:
    """Replace this process by the same command under torchrun, with --nproc ranks. Only for --mini."""
    cores = os.cpu_count() or 1
    ranks = args.nproc or torch.cuda.device_count() or min(cores, 4)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // ranks, 1)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    # torchrun would take --nproc for an abbreviation of its own option.
    rest = re.sub(r"--nproc[ =]\d+", "", shlex.join(argv))
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "scripts.reproduce", *shlex.split(rest)])


def main(argv: list[str] | None = None) -> None:
    start, argv = time.perf_counter(), sys.argv[1:] if argv is None else argv
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
    for model, of_model in rows.items():
        if args.experiment == "ablation" and launcher.main:
            print(left_out(model, of_model), flush=True)
        seeds = [pipeline.run(of_model, args.experiment != "samples") for pipeline in pipelines]
        if quickstart and not launcher.dry:
            of_model = with_best_guided(of_model, seeds)
        results[model] = of_model, seeds
    if launcher.main and not launcher.dry:
        write_report(args, results, launcher.world_size, time.perf_counter() - start)


if __name__ == "__main__":
    run_command(main)
