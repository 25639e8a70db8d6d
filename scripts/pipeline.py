"""Commands of this project in a row: what was trained, sampled or evaluated already is not done again.

Experiments say which samples they want (``Row``); a ``Pipeline`` runs the commands behind them, through
a ``Launcher``: in this process for the bundled models, under torchrun for the published ones, or
printed alone.
"""

import importlib
import shlex
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from cca.distributed import Processes
from models import UserError, zoo_entry
from models.files import parse_json, read_json, write_json
from models.llamagen import LlamaGen
from models.options import command_line
from models.plan import hidden_plans
from models.var import VAR

TRAINING = {VAR: "train_var_cca", LlamaGen: "train_llamagen_cca"}


@dataclass(frozen=True)
class Run:
    """A fine-tuning; ``options`` are those of the training command."""

    name: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A set of samples and its figures.

    weights: "base", "cca" (as published), or the run that makes them. sampling: options of
    sample.py. published: FID-50k of the paper, where it has one.
    """

    model: str
    name: str
    label: str
    weights: "str | Run" = "base"
    sampling: tuple[str, ...] = ()
    published: float | None = None

    @property
    def key(self) -> str:
        return f"{self.model}-{self.name}"


class Launcher(ABC):
    """How a command is run, and on how many processes; ``dry`` prints it alone."""

    dry: bool

    @property
    @abstractmethod
    def processes(self) -> int: ...

    @property
    def main(self) -> bool:
        """Whether this process prints and writes reports."""
        return True

    @abstractmethod
    def run(self, module: str, arguments: list[str]) -> None:
        """Run the command of ``module``, such as "sample" or "scripts.extract_codes"; raises UserError."""


@dataclass
class InProcess(Launcher):
    """All processes of this torchrun call the command's ``main``: small commands need no start-up each."""

    own: Processes
    dry: bool = False

    @property
    def processes(self) -> int:
        return self.own.world

    @property
    def main(self) -> bool:
        return self.own.main

    def run(self, module: str, arguments: list[str]) -> None:
        if self.main:
            print(f"$ python {command_line(module, arguments)}", flush=True)
        if not self.dry:
            with hidden_plans():
                importlib.import_module(module).main(arguments)
            self.own.barrier()


@dataclass
class Torchrun(Launcher):
    """Every command is a torchrun of its own, with ``per_node`` processes on each of ``nodes`` machines.

    On several machines the script is started on each of them with the same ``endpoint`` (HOST:PORT of
    the first), in a folder that they share.
    """

    per_node: int
    nodes: int = 1
    endpoint: str = ""
    dry: bool = False

    @property
    def processes(self) -> int:
        return self.per_node * self.nodes

    def run(self, module: str, arguments: list[str]) -> None:
        several = f"--nnodes {self.nodes} --rdzv-backend c10d --rdzv-endpoint {self.endpoint}"
        where = several if self.nodes > 1 else "--standalone"
        line = f"{where} --nproc_per_node {self.per_node} {command_line(module, arguments)}"
        print(f"$ torchrun {line}", flush=True)
        if not self.dry:
            status = subprocess.call([sys.executable, "-m", "torch.distributed.run", *shlex.split(line)])
            if status:
                raise UserError(f"{module} ended with status {status}; this script goes on from there")


@dataclass
class Pipeline:
    """Trains, samples and evaluates in ``folder``; ``shared`` holds codes, which do not depend on the seed.

    data: images to train on. features: of eval_fid.py.
    """

    folder: Path
    shared: Path
    launcher: Launcher
    data: str
    reference: str
    features: str
    num_samples: int
    seed: int = 0
    batch_size: int | None = None
    planned: set[Path] = field(default_factory=set)

    def claim(self) -> None:
        """Note the options that all results depend on; raises UserError where others were noted."""
        options = {
            "seed": self.seed,
            "samples": self.num_samples,
            "reference": self.reference,
            "data": self.data,
        }
        path = self.folder / "options.json"
        if path.exists():
            before = read_json(path)
            for name, value in options.items():
                if before.get(name) != value:
                    raise UserError(
                        f"--output: {self.folder} holds results with {name} {before.get(name)}, not {value}; "
                        "take another folder"
                    )
        if self.launcher.main and not self.launcher.dry:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, options)

    def missing(self, path: Path) -> bool:
        """Whether a step has yet to be run; a dry run plans every step once, whatever is there."""
        if self.launcher.dry:
            planned = path in self.planned
            self.planned.add(path)
            return not planned
        return not path.exists()

    def make(self, path: Path, module: str, arguments: list[str]) -> None:
        """Run the command that makes ``path``; raises UserError where a signal stopped it before."""
        self.launcher.run(module, arguments)
        if not self.launcher.dry and not path.exists():
            raise UserError(f"{module} was stopped; this script goes on from there")

    def train(self, model: str, run: Run) -> str:
        """Path of the weights that a run makes."""
        backbone, folder = zoo_entry(model).backbone, self.folder / f"{model}-{run.name}"
        weights = folder / backbone.checkpoint_name
        if self.missing(weights):
            fixed = ["--model", model, *self.training_data(model), "--seed", str(self.seed)]
            self.make(weights, TRAINING[backbone], [*fixed, *run.options, "--output", str(folder)])
        return str(weights)

    def training_data(self, model: str) -> list[str]:
        """Where a training command finds its data; codes are extracted on first use."""
        entry = zoo_entry(model)
        if not entry.backbone.trains_on_codes:
            return ["--data", self.data]
        codes = self.shared / f"codes-{entry.tokenizer}-{entry.default_image_size}"
        if self.missing(codes / "header.json"):
            options = ["--model", model, "--data", self.data, "--output", str(codes)]
            self.make(codes / "header.json", "scripts.extract_codes", options)
        return ["--codes", str(codes)]

    def weights(self, row: Row) -> str:
        """What sample.py takes as --weights, trained if need be."""
        return row.weights if isinstance(row.weights, str) else self.train(row.model, row.weights)

    def sample(self, row: Row) -> Path:
        path = self.folder / "samples" / f"{row.key}.npz"
        if self.missing(path):
            fixed = ["--model", row.model, "--weights", self.weights(row), "--seed", str(self.seed)]
            if self.batch_size:
                fixed += ["--batch-size", str(self.batch_size)]
            number = [] if "--num-samples" in row.sampling else ["--num-samples", str(self.num_samples)]
            self.make(path, "sample", [*fixed, *number, *row.sampling, "--output", str(path)])
        return path

    def evaluate(self, row: Row) -> Path:
        path, samples = self.folder / "results" / f"{row.key}.json", self.sample(row)
        if self.missing(path):
            fixed = ["--samples", str(samples), "--reference", self.reference, "--features", self.features]
            self.make(path, "eval_fid", [*fixed, "--output", str(path)])
        return path

    def figures(self, row: Row) -> dict:
        """Metrics of a row, with images per second of its sampling, and processor-hours of its run."""
        report = read_json(self.evaluate(row))
        sampled = read_json(self.folder / "samples" / f"{row.key}.json")
        figures = {**report["metrics"], "images_per_second": sampled["images_per_second"]}
        if isinstance(row.weights, Run):
            folder = self.folder / f"{row.model}-{row.weights.name}"
            batch = read_json(folder / "config.json")["options"]["batch_size"]
            steps = [parse_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            seconds = sum(batch / step["images_per_second"] for step in steps)
            figures["training_hours"] = seconds * self.launcher.processes / 3600
        return figures

    def run(self, rows: list[Row]) -> dict[str, dict]:
        """Figures of all rows by key; trains everything first, so that a mistake there shows early."""
        for row in rows:
            self.weights(row)
        for row in rows:
            self.evaluate(row)
        return {} if self.launcher.dry else {row.key: self.figures(row) for row in rows}
