"""A training run, from the command line to the exported model: what the training commands share.

``run_training`` loads and checks, ``train`` is the loop: data in, optimizer steps (``trainer.py``, whose
loss is in ``losses.py``), metrics out, saving, stopping.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from cca.data.sources import TokenSource
from cca.distributed import Processes, StopRequest
from cca.training.data_record import data_record, refuse_renumbered
from cca.training.gpu import explaining_memory, fitting_micro_batch, peak_rate, training_memory
from cca.training.loader import Unreadable, own_items
from cca.training.losses import LOSSES, Batch, missing_negatives, pair_labels
from cca.training.options import COMPILED_FROM, chosen_recipe, training_config
from cca.training.preview import grid_drawer
from cca.training.run_folder import RunFolder, describe, noted_micro_batch, refuse_others
from cca.training.schedule import TrainingConfig, global_batches, unconditional_rows
from cca.training.states import ema_name, saved_steps
from cca.training.trainer import Trainer
from models import ARImageModel, UserError, find_files, zoo_entry
from models.devices import TRAINED_IMAGES, allow_tf32, compute_deterministically
from models.outputs import check_output
from models.plan import numbers, show_plan, size_text

PUBLISHED_GPUS = 8  # on which the recipes' accumulation steps were counted


def run_training(
    args: argparse.Namespace,
    path: Path,
    open_data: Callable[[Path, ARImageModel, int], TokenSource],
) -> None:
    """Load model and data, then train; ``open_data`` takes path, model and seed. Raises UserError."""
    recipe = chosen_recipe(args, zoo_entry(args.model))
    if args.weights == "cca":
        raise UserError("--weights: training starts from base or from a path")
    check_output("--output", args.output, {"the data": path}, folder=True)
    if args.deterministic:
        compute_deterministically()
    processes = Processes()
    allow_tf32(processes.device)
    files = find_files(args.model, args.weights, args.tokenizer_weights, args.image_size)
    model = files.build()
    data = open_data(path, model, args.seed)
    config = training_config(args, recipe, len(data), model.lr_scales_with_batch)
    parallel = args.parallel or recipe.parallel
    check_parallel(args, config, parallel, processes)
    long = processes.device.type == "cuda" and config.max_steps >= COMPILED_FROM
    compile = long if args.compile is None else args.compile
    published = config.batch_size // (PUBLISHED_GPUS * recipe.published_accumulation)
    if recipe.published_accumulation == 1:
        published = TRAINED_IMAGES[processes.device.type]
    # A run that goes on elsewhere keeps its size, which decides the masks of dropout.
    noted, done = processes.look_once(lambda: (noted_micro_batch(args.output), saved_steps(args.output)))
    asked = args.micro_batch_size or noted
    micro_batch_size = max(min(asked or published, config.batch_size), 1)
    most = math.ceil(config.batch_size / processes.world)
    sharded = parallel == "fsdp" and processes.world > 1
    fitted = not (asked or config.max_steps in done or args.deterministic or sharded)
    downloads = files.downloads(model)
    computed = {"deterministic": args.deterministic, "compile": compile}

    def show() -> None:
        known = {**files.known(), "images": len(data), **computed}
        refuse_others(args.output, describe(config, known)["options"])
        largest = min(micro_batch_size, most)
        micro = f"a micro-batch of {largest} images"
        rows = training_plan(args, config, model, path, data)
        rows["device"] = (
            f"{processes.devices} ({parallel}), {config.dtype}, "
            f"{'compiled' if compile else 'eager'}, {micro}"
            + (" or what fits" if fitted and processes.device.type == "cuda" else "")
            + (" as before" if noted and not args.micro_batch_size else "")
        )
        shards = processes.world if sharded else 1
        needed = training_memory(model, config, largest, shards, args.checkpointing)
        rows["memory"] = f"~{size_text(needed)} a process with {micro}"
        rows["writes"] = f"{args.output}/: {written(args, config, model)}"
        if done:
            rows["resumes"] = f"after step {done[-1]:,} of {config.max_steps:,}"
        show_plan(files.plan(model, args.weights) | rows, downloads)

    if not processes.planned(show, downloads, args.dry_run):
        return
    files = files.fill(model)
    data.check_tokenizer()
    compared, told = data_record(path, data, processes)
    options = {**files.describe(), **compared, **computed}
    description = {**describe(config, options, processes.command(args.command)), "data": told}
    with processes.holding(args.output, description["options"], folder=True):
        folder = RunFolder(args.output, processes, description, args.keep_states)
        refuse_renumbered(folder.path, data.classes)
        if processes.main:
            without = missing_negatives(config.loss, config.batch_size, data.same_class)
            for note in [*data.notes(), *([without] if without else [])]:
                print(f"note: {note}", file=sys.stderr)
        with explaining_memory(0, args.checkpointing):
            trainer = Trainer(
                model, config, micro_batch_size, processes, parallel, compile, args.checkpointing
            )
        if fitted:
            choose_micro_batch(trainer, most)
        draw = (
            grid_drawer(trainer, folder.path / "samples", data.classes)
            if args.sample_every
            else lambda step: None
        )
        with explaining_memory(min(trainer.micro_batch_size, most), args.checkpointing):
            train(
                trainer, data, folder, args.save_every, args.log_every, args.workers, args.sample_every, draw
            )


def choose_micro_batch(trainer: Trainer, most: int) -> None:
    """On GPUs, as many images as fit into the memory of each, instead of as many as were published."""
    processes = trainer.processes
    if processes.device.type == "cuda":
        trainer.micro_batch_size = min(processes.each(fitting_micro_batch(trainer, most)))
        if processes.main:
            print(f"micro-batch of {trainer.micro_batch_size} images, which the memory holds", flush=True)


def check_parallel(
    args: argparse.Namespace, config: TrainingConfig, parallel: str, processes: Processes
) -> None:
    """Raise UserError for options that do not go with the number of processes, or with sharding."""
    if config.batch_size < processes.world:
        raise UserError(f"--batch-size: {config.batch_size} is less than the {processes.world} processes")
    if parallel == "fsdp" and config.batch_size % processes.world:
        raise UserError(
            f"--batch-size: with --parallel fsdp it must be a multiple of the {processes.world} processes, "
            f"{config.batch_size} is not"
        )
    if parallel == "fsdp" and config.dtype == "float16":
        raise UserError("--dtype: --parallel fsdp takes bfloat16 or float32, not float16")
    if parallel == "fsdp" and args.sample_every and processes.world > 1:
        raise UserError(
            "--sample-every: a sharded model cannot draw samples; "
            "use --parallel ddp, or sample.py on a finished run"
        )


def training_plan(
    args: argparse.Namespace,
    config: TrainingConfig,
    model: ARImageModel,
    path: Path,
    data: TokenSource,
) -> dict[str, str]:
    """What is shown before the work, of the training itself."""
    kind = LOSSES[config.loss]
    values = [f"{name.rstrip('_')} {getattr(config, name):g}" for name in kind.hyperparameters]
    classes = "" if data.classes is None else f" in {len(data.classes)} class folders"
    images = config.max_steps * config.batch_size
    return {
        "data": f"{path}, {len(data):,} images{classes}",
        "training": ", ".join([config.loss, *values, f"learning rate {config.lr:g}"]),
        "steps": f"{config.max_steps:,} of {config.batch_size} images ({images / len(data):.3g} epochs), "
        f"seed {config.seed}",
    }


def written(args: argparse.Namespace, config: TrainingConfig, model: ARImageModel) -> str:
    """What a run leaves in its folder."""
    name = model.checkpoint_name
    models = [name, *([ema_name(name)] if config.ema else [])]
    samples = ["samples"] if args.sample_every else []
    # AdamW's moments beside the weights; a new state is whole before an old one goes.
    size = size_text(4 * numbers(model.transformer) * (3 + bool(config.ema)))
    return ", ".join([
        *models, "config.json", "metrics.jsonl", "curves.png", "tensorboard", *samples,
        f"state (~{size} each, up to {args.keep_states + 1} at a time)",
    ])  # fmt: skip


def train(
    trainer: Trainer,
    data: TokenSource,
    folder: RunFolder,
    save_every: int,
    log_every: int,
    workers: int = 0,
    sample_every: int = 0,
    draw_samples: Callable[[int], None] = lambda step: None,
) -> None:
    """Run or resume training up to ``max_steps``, then leave model and state in ``folder``."""
    config, processes = trainer.config, trainer.processes
    peak = peak_rate(processes.device)
    with StopRequest() as request:
        done = folder.resume(trainer)
        share, negatives_of = processes.share(config.batch_size), LOSSES[config.loss].negatives
        items, unreadable = own_items(data, config, done, share, workers), Unreadable(data, processes)
        with tqdm(
            total=config.max_steps,
            initial=done,
            desc=f"{config.loss} {folder.path.name}",
            disable=not processes.main,
        ) as bar:
            for epoch, indices in global_batches(len(data), config, done):
                began = time.perf_counter()
                uncond = unconditional_rows(indices, epoch, config)
                labels, negatives = pair_labels(
                    data.labels(indices), uncond, trainer.model.null_class, negatives_of
                )
                views, flags = next(items)
                batch = Batch(data.tokens(views), labels[share], negatives[share], uncond[share])
                metrics = trainer.optimizer_step(done, batch)
                seconds = time.perf_counter() - began
                metrics["images_per_second"] = config.batch_size / seconds
                if peak:
                    metrics["mfu"] = trainer.flops / seconds / peak
                done += 1
                if processes.main:
                    show(bar, metrics, done % log_every == 0)
                # A signal reaches the processes at different moments; they agree on the step to stop at.
                flagged = float(request.asked), float(unreadable.report(flags))
                asked, missing = processes.agree(partial(folder.log, done, metrics), True, *flagged)
                stop = bool(asked)
                unreadable.add(int(missing))
                if stop or done % save_every == 0 or done == config.max_steps:
                    folder.save(trainer, done)
                if sample_every and done % sample_every == 0:
                    draw_samples(done)
                if stop and done < config.max_steps:
                    break
        if done == config.max_steps:
            folder.export(trainer)
        elif processes.main:
            print(f"stopped and saved after step {done}; the same command goes on from there")


def show(bar: tqdm, metrics: dict[str, float], refresh: bool) -> None:
    bar.update()
    if refresh:
        shown = (
            "loss",
            "rewards/accuracies",
            "rewards/margins",
            "images_per_second",
            "mfu",
            *(["skipped_steps"] if metrics["skipped_steps"] else []),
        )
        bar.set_postfix({k: f"{metrics[k]:.4g}" for k in shown if k in metrics})
