"""A training run, from the command line to the exported model: what the training commands share.

``run_training`` loads and checks, ``train`` is the loop: data in, optimizer steps (``trainer.py``, whose
loss is in ``losses.py``), metrics out, saving, stopping.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from cca.data.sources import TokenSource
from cca.distributed import Processes, StopRequest
from cca.training.data_record import data_record, refuse_renumbered
from cca.training.gpu import explaining_memory, fitting_micro_batch, peak_rate
from cca.training.loader import Unreadable, own_items
from cca.training.losses import LOSSES, Batch, missing_negatives, pair_labels
from cca.training.preview import grid_drawer
from cca.training.run_folder import RunFolder, describe
from cca.training.schedule import TrainingConfig, global_batches, unconditional_rows
from cca.training.trainer import Trainer
from models import (
    DTYPES,
    ARImageModel,
    Recipe,
    UserError,
    load_files,
    locate,
    model_names,
    zoo_entry,
)
from models.devices import TRAINED_IMAGES, allow_tf32, compute_deterministically, device_name
from models.options import Parser, add_model_options, add_workers_option, count, number
from models.outputs import check_output
from models.zoo import ZooEntry

PUBLISHED_GPUS = 8  # on which the recipes' accumulation steps were counted
# Optimizer steps of a run from which on compilation pays on a GPU (sharded, it would gather in float32).
COMPILED_FROM = 1000


def run_training(
    args: argparse.Namespace,
    backbone: type[ARImageModel],
    path: Path,
    open_data: Callable[[Path, ARImageModel, int], TokenSource],
) -> None:
    """Load model and data, then train; ``open_data`` takes path, model and seed. Raises UserError."""
    recipe = chosen_recipe(args, zoo_entry(args.model, backbone))
    if args.weights == "cca":
        raise UserError("--weights: training starts from base or from a path")
    check_output("--output", args.output, {"the data": path}, folder=True)
    if args.deterministic:
        compute_deterministically()
    processes = Processes()
    allow_tf32(processes.device)
    files = locate(args.model, args.weights, args.tokenizer_weights, args.image_size)
    model = load_files(files)
    data = open_data(path, model, args.seed)
    config = training_config(args, recipe, len(data), backbone.lr_scales_with_batch)
    parallel = args.parallel or recipe.parallel
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
    compared, told = data_record(path, data, processes)
    long = processes.device.type == "cuda" and config.max_steps >= COMPILED_FROM and parallel != "fsdp"
    compile = long if args.compile is None else args.compile
    compared |= {"deterministic": args.deterministic, "compile": compile}
    description = {**describe(config, {**files.describe(), **compared}), "data": told}
    published = config.batch_size // (PUBLISHED_GPUS * recipe.published_accumulation)
    if recipe.published_accumulation == 1:
        published = TRAINED_IMAGES[processes.device.type]
    micro_batch_size = args.micro_batch_size or max(published, 1)
    with processes.holding(args.output, description["options"], folder=True):
        folder = RunFolder(args.output, processes, description, args.keep_states)
        refuse_renumbered(folder.path, data.classes)
        if processes.main:
            without = missing_negatives(config.loss, config.batch_size, data.same_class)
            for note in [*data.notes(), *([without] if without else [])]:
                print(f"note: {note}", file=sys.stderr)
        with explaining_memory(args.checkpointing):
            trainer = Trainer(
                model, config, micro_batch_size, processes, parallel, compile, args.checkpointing
            )
            if args.micro_batch_size is None and not (args.deterministic or trainer.sharded):
                choose_micro_batch(trainer)
            if processes.main:
                where = f"{device_name(processes.device)} x {processes.world} ({parallel})"
                batch = f"batch {config.batch_size}, micro-batch {trainer.micro_batch_size}"
                how = f"{config.dtype}, {batch}, {'compiled' if compile else 'eager'}"
                print(
                    f"{config.loss} of {args.model} at {model.image_size} pixels, {where}, {how}", flush=True
                )
            draw = grid_drawer(trainer, folder.path / "samples") if args.sample_every else lambda step: None
            train(
                trainer, data, folder, args.save_every, args.log_every, args.workers, args.sample_every, draw
            )


def choose_micro_batch(trainer: Trainer) -> None:
    """On a GPU, as many images as fit into its memory, instead of as many as were published."""
    processes, share = trainer.processes, trainer.processes.share(trainer.config.batch_size)
    if processes.device.type == "cuda":
        trainer.micro_batch_size = fitting_micro_batch(trainer, share.stop - share.start)


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
            "accuracy",
            "margin",
            "images_per_second",
            "mfu",
            *(["skipped_steps"] if metrics["skipped_steps"] else []),
        )
        bar.set_postfix({k: f"{metrics[k]:.4g}" for k in shown if k in metrics})


# fmt: off
def training_parser(
    description: str, backbone: type[ARImageModel], data_option: str, data_help: str
) -> Parser:
    """The parser of a backbone's training command; ``data_option`` is where its data comes from."""
    parser = Parser(description)
    add = parser.add_argument
    recipe = "default: the model's recipe"
    add_model_options(parser, model_names(backbone), "base|PATH")
    add(data_option, required=True, type=Path, metavar="PATH", help=data_help)
    add("--output", required=True, type=Path, metavar="DIR",
        help="run folder; the same command again resumes it")
    add("--loss", choices=LOSSES, default="cca",
        help="training loss (default cca); sft is plain maximum likelihood")
    add("--recipe", choices=("with-guidance",),
        help="other defaults for --loss cca: with-guidance, for sampling with guidance on top")
    add("--beta", type=number(0, above=True), help=f"inverse temperature of the reward ({recipe})")
    add("--lambda", dest="lambda_", type=number(0), help=f"weight of the negatives ({recipe})")
    add("--uncond-ratio", type=number(0, 1), help=f"share of images trained without their class ({recipe})")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=count(), help=f"passes over the data ({recipe})")
    length.add_argument("--max-steps", type=count(), help="optimizer steps, instead of --epochs")
    add("--batch-size", type=count(), help=f"global batch in images, over all processes ({recipe})")
    add("--micro-batch-size", type=count(),
        help="images of one forward pass in one process (default: what fits a GPU's memory; "
        "on CPUs, with --deterministic and fsdp as published on 8 GPUs; mini: 32)")
    add("--lr", type=number(0), help=f"peak learning rate ({recipe}; VAR: times batch size / 256)")
    add("--warmup", type=number(0, 1), help=f"fraction of the run with rising rate ({recipe})")
    add("--final-lr", type=number(0, 1), help=f"last rate over peak rate; 1 keeps it constant ({recipe})")
    add("--weight-decay", type=number(0), help=f"AdamW weight decay ({recipe})")
    add("--final-weight-decay", type=number(0),
        help=f"weight decay at the end, reached along a cosine ({recipe}: constant but for var-d30)")
    add("--grad-clip", type=number(0, above=True), help=f"largest gradient norm ({recipe})")
    add("--ema", type=number(0, 1), default=0.0, metavar="DECAY",
        help="also keep and write an average of the weights, e.g. 0.999 (default 0: none)")
    add("--dtype", choices=DTYPES, help=f"precision of the forward pass; float16 scales the loss ({recipe})")
    add("--parallel", choices=("ddp", "fsdp"),
        help=f"replicate the model in each process, or shard it ({recipe})")
    add("--compile", action=argparse.BooleanOptionalAction,
        help=f"compile the blocks (default: on GPUs for {COMPILED_FROM:,} steps or more, not fsdp)")
    add("--checkpointing", action="store_true",
        help="keep no activations of the blocks, compute them again in the backward pass")
    add("--deterministic", action="store_true",
        help="compute so that a run on GPUs can be repeated bit for bit, more slowly")
    add_workers_option(parser)
    add("--seed", type=count(0), default=0,
        help="seed of data order, crops, null-class draws and dropout (default 0)")
    add("--save-every", type=count(), default=100, help="steps between saved states (default 100)")
    add("--keep-states", type=count(), default=1, metavar="N",
        help="newest saved states to keep, e.g. to sample from (default 1)")
    add("--log-every", type=count(), default=10,
        help="steps between updates of the shown metrics (default 10)")
    add("--sample-every", type=count(0), default=0,
        help="steps between guidance-free sample grids in DIR/samples (default 0: none)")
    return parser


# fmt: on

FROM_RECIPE = (
    "beta", "lambda_", "uncond_ratio", "weight_decay", "final_weight_decay", "grad_clip", "warmup",
    "final_lr", "dtype",
)  # fmt: skip


def chosen_recipe(args: argparse.Namespace, entry: ZooEntry) -> Recipe:
    """The defaults of a run; raises UserError where there are none and the user gives no values either."""
    if args.recipe is not None:
        if args.loss != "cca" or args.recipe not in entry.recipes:
            raise UserError(
                f"--recipe: there is none named {args.recipe} for {args.model} and --loss {args.loss}"
            )
        return entry.recipes[args.recipe]
    if args.loss not in entry.recipes:
        needed = (*LOSSES[args.loss].hyperparameters, "lr")
        missing = [f"--{name.rstrip('_')}" for name in needed if getattr(args, name) is None]
        if missing:
            raise UserError(
                f"--loss: no values are published for {args.loss} on {args.model}; give {', '.join(missing)}"
            )
    return entry.recipes.get(args.loss, entry.recipes["cca"])


def training_config(
    args: argparse.Namespace, recipe: Recipe, images: int, lr_scales_with_batch: bool
) -> TrainingConfig:
    """The recipe with what the user gave instead; raises UserError for a batch larger than the data."""

    def pick(name: str):
        given = getattr(args, name)
        return getattr(recipe, name) if given is None else given

    batch_size = pick("batch_size")
    if batch_size > images:
        raise UserError(f"--batch-size: {batch_size} is more than the {images} images of the data")
    recipe_lr = recipe.lr * (batch_size / recipe.batch_size if lr_scales_with_batch else 1)
    return TrainingConfig(
        loss=args.loss,
        batch_size=batch_size,
        lr=recipe_lr if args.lr is None else args.lr,
        schedule_accumulation=recipe.published_accumulation,
        max_steps=args.max_steps or pick("epochs") * (images // batch_size),
        ema=args.ema,
        seed=args.seed,
        **{name: pick(name) for name in FROM_RECIPE},
    )
