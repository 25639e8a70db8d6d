"""The job of the training commands: from parsed options and data to the training loop."""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cca.cli.compilation import decide_compile
from cca.cli.main import play
from cca.cli.output import Output, OutputStatus
from cca.config import TrainingConfig
from cca.data.datasets import LabelledDataset
from cca.distributed import Ranks
from cca.losses import LOSSES, missing_negatives
from cca.training.loader import Loader
from cca.training.loop import train
from cca.training.memory import MICRO_BATCH_TOO_LARGE, MODEL_TOO_LARGE, fitting_micro_batch
from cca.training.options import COMPILED_FROM, chosen_recipe, training_config
from cca.training.reporting import check_reporter
from cca.training.run_folder import KEPT, MICRO_BATCH, RunFolder
from cca.training.trainer import Trainer
from cca.training.unreadable import NOTED
from models import ARImageModel, Recipe, UserError, find_files, zoo_entry
from models.utils.files import size_text
from models.utils.precision import TRAINED_IMAGES, allow_tf32, compute_deterministically, oom_as_user_error
from models.zoo.loading import ModelFiles, count_parameters
from models.zoo.run_folders import ema_name, saved_steps

PUBLISHED_GPUS = 8  # the recipes' accumulation steps are for this many GPUs
# (path, model, seed) -> the training data.
OpenData = Callable[[Path, ARImageModel, int], LabelledDataset]


def run_training(args: argparse.Namespace, path: Path, open_data: OpenData) -> None:
    """Run a training command. ``path``: the data. Raises UserError."""
    entry = zoo_entry(args.model)
    recipe = chosen_recipe(args, entry)
    if args.weights == "cca":
        raise UserError("--weights: training does not start from cca; give base or a path")
    output = Output.run(args.output, entry.backbone.checkpoint_name)
    output.check_place({"--codes" if entry.backbone.trains_on_codes else "--data": path})
    check_reporter(args.report_to)
    if args.deterministic:
        compute_deterministically()

    def resolve(args: argparse.Namespace, ranks: Ranks, status: OutputStatus) -> Training:
        allow_tf32(ranks.device)
        files = find_files(args.model, args.weights, args.tokenizer_weights, args.image_size)
        model = files.build()
        data = open_data(path, model, args.seed)
        if data.source and status.content:
            data.source.resume(status.content.get(NOTED, {}))
        config = training_config(args, recipe, len(data), model.lr_scales_with_batch)
        return Training(args, ranks, status, files, model, path, data, config, recipe)

    job = play(args, output, resolve)
    if job and job.ranks.is_main:
        RunFolder(args.output, job.ranks, job.all_options).draw_curves()


@dataclass
class Training:
    """A run to start or resume, resolved from the options and the status of the output."""

    args: argparse.Namespace
    ranks: Ranks
    status: OutputStatus
    files: ModelFiles
    model: ARImageModel
    path: Path
    data: LabelledDataset
    config: TrainingConfig
    recipe: Recipe
    parts: None = None  # a run folder is not written in parts

    def __post_init__(self) -> None:
        args, config, ranks = self.args, self.config, self.ranks
        on_gpu = ranks.device.type == "cuda"
        self.images = len(self.data)
        self.downloads = self.files.downloads(self.model)
        self.parallel = args.parallel or self.recipe.parallel
        check_parallel(args, config, self.parallel, ranks)
        default = on_gpu and config.max_steps >= COMPILED_FROM
        self.compile = decide_compile(args.compile, default, self.status, ranks)
        self.rank_images = math.ceil(config.batch_size / ranks.world_size)  # images of a step on this rank
        self.keep_states = args.keep_states or number_in_config(args.output, self.status, KEPT) or 1
        # A run that is resumed elsewhere keeps its micro-batch, since dropout's masks depend on it.
        previous = 0 if args.micro_batch_size else number_in_config(args.output, self.status, MICRO_BATCH)
        self.previous_micro_batch = previous
        self.micro_batch_size = self.choose_micro_batch(self.parallel == "fsdp" and ranks.world_size > 1)

    def choose_micro_batch(self, is_sharded: bool) -> int | None:
        """Return the images per forward pass; None: ``work`` takes as many as fit in GPU memory."""
        args, device, batch_size = self.args, self.ranks.device.type, self.config.batch_size
        if size := args.micro_batch_size or self.previous_micro_batch:
            return min(size, batch_size)
        if device == "cuda" and not (args.deterministic or is_sharded):
            return None
        accumulation = self.recipe.published_accumulation
        published = batch_size // (PUBLISHED_GPUS * accumulation)
        return max(1, min(TRAINED_IMAGES[device] if accumulation == 1 else published, batch_size))

    def identity(self) -> dict:
        """Return the options that must agree on resume, named as in config.json, except data_sha256."""
        of_data = {"exif_orientation": self.data.exif_orientation}
        computed = {"deterministic": self.args.deterministic, "compile": self.compile}
        return {
            **self.config.options(),
            **self.files.provenance(),
            "images": self.images,
            **of_data,
            **computed,
        }

    def plan(self) -> dict[str, str]:
        config, data = self.config, self.data
        values = [f"{name} {getattr(config, name):g}" for name in LOSSES[config.loss].hyperparameters]
        classes = "" if data.classes is None else f" in {len(data.classes)} class folders"
        epochs = config.max_steps * config.batch_size / self.images
        micro = "the largest micro-batch that fits in GPU memory"
        if self.micro_batch_size:
            micro = f"a micro-batch of {min(self.micro_batch_size, self.rank_images)} images"
            micro += " as before" if self.previous_micro_batch else ""
        rows = {
            "data": f"{data.source.root if data.source else self.path}, {self.images:,} images{classes}",
            "training": ", ".join([config.loss, *values, f"learning rate {config.lr:g}"]).replace("_ ", " "),
            "steps": f"{config.max_steps:,} of {config.batch_size} images ({epochs:.3g} epochs), "
            f"seed {config.seed}",
            "device": f"{self.ranks.devices} ({self.parallel}), {config.dtype}, "
            f"{'compiled' if self.compile else 'eager'}, {micro}",
            "writes": f"{self.args.output}/: {self.output_files()}",
        }
        if (done := saved_steps(self.args.output)) and not self.status.is_finished:
            rows["resumes"] = f"after step {done[-1]:,} of {config.max_steps:,}"
        return self.files.plan(self.model) | rows

    def output_files(self) -> str:
        """Return the names of the files and folders that the run writes, for the plan."""
        name, ema = self.model.checkpoint_name, bool(self.config.ema)
        files = [name, ema_name(name) if ema else "", "config.json", "metrics.jsonl", "curves.png"]
        # Weights, AdamW's two moments and the average. Old checkpoints are removed after the new one.
        size = size_text(4 * count_parameters(self.model.transformer) * (3 + ema))
        state = f"state (~{size} each, up to {self.keep_states + 1} at a time)"
        files += [
            "" if self.args.report_to == "none" else self.args.report_to,
            "samples" if self.args.sample_every else "",
            state,
        ]
        return ", ".join(filter(None, files))

    def prepare(self) -> dict:
        self.files = self.files.load_into(self.model)
        self.data.check_tokenizer(self.model)
        self.all_options = {**self.identity(), "data_sha256": self.ranks.digest(self.data.fingerprint)}
        labels, tokenizer = self.data.occurring_classes(), self.files.tokenizer_file
        if labels and len(labels) == self.model.num_classes:
            labels = None  # all classes
        return {
            "command": self.ranks.command(self.args.command),
            "options": self.all_options,
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
            "data": {"path": str(self.path), "classes": self.data.classes, "labels": labels},
            "tokenizer": tokenizer and tokenizer.address,
        }

    def work(self, content: dict) -> bool:
        args, config, ranks = self.args, self.config, self.ranks
        folder = RunFolder(args.output, ranks, self.all_options, self.keep_states, args.report_to)
        if ranks.is_main:
            self.print_notes()
        with oom_as_user_error(MODEL_TOO_LARGE):
            self.model.transformer.checkpointing = args.checkpointing
            size = self.micro_batch_size or 1
            trainer = Trainer(self.model, config, size, ranks, self.parallel, self.compile)
        if self.micro_batch_size is None:
            trainer.micro_batch_size = min(ranks.all_gather(fitting_micro_batch(trainer, self.rank_images)))
            if ranks.is_main:
                print(
                    f"micro-batch of {trainer.micro_batch_size} images, chosen to fit in GPU memory",
                    flush=True,
                )
        loader = Loader(self.data, config, ranks, self.model.null_class, args.workers)
        with oom_as_user_error(MICRO_BATCH_TOO_LARGE):
            return train(trainer, loader, folder, args.save_every, args.log_every, args.sample_every)

    def print_notes(self) -> None:
        """Print notes on the data to standard error."""
        classes = self.data.occurring_classes()
        without = missing_negatives(self.config.loss, self.config.batch_size, classes)
        for note in [*self.data.notes(), *filter(None, [without])]:
            print(f"note: {note}", file=sys.stderr)


def number_in_config(run: Path, status: OutputStatus, name: str) -> int:
    """Return an entry of config.json that a resumed run keeps, or 0 if the run has no checkpoint yet.

    Raises:
        UserError: the entry is not an integer of at least 1.
    """
    value = (status.content or {}).get(name, 1)
    if type(value) is not int or value < 1:
        raise UserError(
            f"--output: {run}/config.json: {name} is {value!r}, expected an integer of at least 1; "
            "delete that entry"
        )
    return value if name in (status.content or {}) else 0


def check_parallel(args: argparse.Namespace, config: TrainingConfig, parallel: str, ranks: Ranks) -> None:
    """Raise UserError for options that do not fit the number of ranks or --parallel fsdp."""
    if config.batch_size < ranks.world_size:
        raise UserError(
            f"--batch-size: {config.batch_size} is less than the number of ranks ({ranks.world_size})"
        )
    if parallel != "fsdp" or ranks.world_size == 1:
        return
    if config.batch_size % ranks.world_size:
        raise UserError(
            f"--batch-size: {config.batch_size} must be a multiple of the number of ranks "
            f"({ranks.world_size}) with --parallel fsdp"
        )
    if config.dtype == "float16":
        raise UserError("--dtype: float16 does not work with --parallel fsdp; use bfloat16 or float32")
    if args.sample_every:
        raise UserError(
            "--sample-every: does not work with --parallel fsdp; "
            "use --parallel ddp, or run sample.py on the finished run"
        )
