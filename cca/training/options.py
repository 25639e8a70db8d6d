"""The options of the training commands. The defaults come from the recipe of the model and the loss."""

import argparse
from functools import partial
from pathlib import Path

from cca.cli.parser import Parser, add_model_options, add_workers_option, count, limits_of
from cca.cli.plan import add_dry_run_option
from cca.config import TrainingConfig
from cca.losses import LOSSES
from cca.training.reporting import REPORT_TO
from models import ZOO, Recipe, UserError
from models.zoo.registry import ZooEntry

# Runs of at least this many optimizer steps are compiled on a GPU. On one H100, compilation took 21 s for
# LlamaGen-L and 33 s for VAR-d16, and saved 0.2 s per step of 32 images.
COMPILED_FROM = 200


# fmt: off
def training_parser(description: str, module: str, data_option: str, data_help: str) -> Parser:
    """Return the parser of the training command ``module``; ``data_option`` names its training data."""
    parser, limits = Parser(description, module), partial(limits_of, TrainingConfig)
    recipe = "(default: the recipe's)"
    models = [name for name, entry in ZOO.items() if entry.backbone.training_command == module]
    add_model_options(parser, models, "base|PATH|RUN[/state/step-N][:ema]|hf://ORG/REPO/FILE")

    parser.group("data").add_argument(data_option, required=True, type=Path, metavar="PATH", help=data_help)

    add = parser.group("method").add_argument
    add("--loss", choices=LOSSES, default="cca",
        help="training loss; sft is plain maximum likelihood (default: cca)")
    add("--recipe", choices=("with-guidance",),
        help="source of the other defaults; with-guidance: values for --loss cca and sampling with "
        "guidance on top (default: the model's recipe for --loss; `python -m models --json` prints all)")
    add("--beta", **limits("beta"), help=f"inverse temperature of the implicit reward {recipe}")
    add("--lambda", dest="lambda_", metavar="LAMBDA", **limits("lambda_"),
        help=f"weight of the negatives {recipe}")
    add("--uncond-ratio", **limits("uncond_ratio"),
        help=f"fraction of images trained with the null class instead of their own, 0 to 1 {recipe}")

    optimisation = parser.group("optimisation")
    add, length = optimisation.add_argument, optimisation.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=count(),
        help=f"passes over the data, each without its incomplete last batch {recipe}")
    length.add_argument("--max-steps", **limits("max_steps"),
        help="optimizer steps, instead of --epochs (default: from --epochs)")
    add("--batch-size", **limits("batch_size"), help=f"images per optimizer step, over all ranks {recipe}")
    add("--lr", **limits("lr"),
        help="peak learning rate (default: the recipe's; for VAR it scales in proportion to --batch-size)")
    add("--warmup", **limits("warmup"),
        help=f"fraction of the run in which the learning rate rises, 0 to 1 {recipe}")
    add("--final-lr", **limits("final_lr"),
        help=f"last learning rate as a fraction of the peak, 0 to 1; 1 keeps it constant {recipe}")
    add("--weight-decay", **limits("weight_decay"), help=f"AdamW weight decay {recipe}")
    add("--final-weight-decay", **limits("final_weight_decay"),
        help="weight decay at the end of the run, approached along a cosine (default: the recipe's; most "
        "recipes keep the weight decay constant)")
    add("--grad-clip", **limits("grad_clip"),
        help=f"largest norm of the gradient, which is of the mean loss over the global batch {recipe}")
    add("--ema", **limits("ema"), default=0.0, metavar="DECAY",
        help="decay per step of a moving average of the weights, such as 0.999; the average is also saved "
        "(default: 0, no average)")
    add("--seed", **limits("seed"), default=0,
        help="random seed of data order, crops, null classes and dropout (default: 0)")

    add = parser.group("performance").add_argument
    add("--micro-batch-size", type=count(),
        help="images per forward pass and rank (default: the largest power of two that fits in GPU memory; "
        "on CPUs, with FSDP or --deterministic: the published value; bundled models on CPUs: 32). "
        "A resumed run keeps its value.")
    add("--dtype", **limits("dtype"),
        help=f"precision of the forward pass; float16 uses loss scaling {recipe}")
    add("--parallel", choices=("ddp", "fsdp"),
        help=f"several ranks: ddp copies the model to each rank, fsdp shards it {recipe}")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="run transformer blocks and likelihood through torch.compile (default: on for GPU runs of at "
        f"least {COMPILED_FROM:,} steps). A resumed run keeps its value.")
    add("--checkpointing", action="store_true",
        help="activation checkpointing: less memory, and the backward pass computes activations again "
        "(default: off)")
    add("--deterministic", action="store_true",
        help="use only deterministic kernels: GPU runs repeat bit for bit, and are slower (default: off)")
    add_workers_option(parser)

    add = parser.group("output").add_argument
    add("--output", required=True, type=Path, metavar="DIR",
        help="run folder; the same command resumes an unfinished run in it")
    add("--save-every", type=count(), default=100, help="steps between checkpoints (default: 100)")
    add("--keep-states", type=count(), metavar="N",
        help="newest checkpoints to keep, for example to sample from (default: 1). "
        "A resumed run keeps its value.")
    add("--log-every", type=count(), default=10,
        help="steps between updates of the metrics in the progress bar (default: 10)")
    add("--report-to", choices=REPORT_TO, default="tensorboard",
        help="where metrics go in addition to metrics.jsonl; wandb is Weights & Biases and needs "
        "requirements-wandb.txt (default: tensorboard)")
    add("--sample-every", type=count(0), default=0,
        help="steps between guidance-free sample grids in DIR/samples (default: 0, no grids)")
    add_dry_run_option(parser)
    return parser


# fmt: on

FROM_RECIPE = (
    "beta", "lambda_", "uncond_ratio", "weight_decay", "final_weight_decay", "grad_clip", "warmup",
    "final_lr", "dtype",
)  # fmt: skip


def chosen_recipe(args: argparse.Namespace, entry: ZooEntry) -> Recipe:
    """Return the recipe that gives a run its defaults.

    Raises:
        UserError: there is no such recipe; no recipe has values for the loss, and the user gives none; or
            the loss does not use a hyperparameter that the user gives.
    """
    used = LOSSES[args.loss].hyperparameters
    for name in ("beta", "lambda_"):
        if name not in used and getattr(args, name) is not None:
            raise UserError(f"--{name.rstrip('_')}: is not used by --loss {args.loss}; leave it out")
    if args.recipe is not None:
        if args.loss != "cca" or args.recipe not in entry.recipes:
            raise UserError(
                f"--recipe: {args.model} has no recipe {args.recipe} for --loss {args.loss}; leave it out"
            )
        return entry.recipes[args.recipe]
    if args.loss in entry.recipes:
        return entry.recipes[args.loss]
    if missing := [f"--{name.rstrip('_')}" for name in (*used, "lr") if getattr(args, name) is None]:
        raise UserError(
            f"--loss: no values are published for {args.loss} on {args.model}; give {', '.join(missing)}"
        )
    return entry.recipes["cca"]


def training_config(
    args: argparse.Namespace, recipe: Recipe, images: int, lr_scales_with_batch: bool
) -> TrainingConfig:
    """Return the recipe's values, except where the user gives others.

    images: their number in the training data. Raises UserError for a batch larger than that.
    """

    def pick(name: str):
        value = getattr(args, name)
        return getattr(recipe, name) if value is None else value

    batch_size = pick("batch_size")
    if batch_size > images:
        raise UserError(f"--batch-size: {batch_size} is more than the {images} images of the data")
    lr_factor = batch_size / recipe.batch_size if lr_scales_with_batch else 1
    return TrainingConfig(
        loss=args.loss,
        batch_size=batch_size,
        lr=recipe.lr * lr_factor if args.lr is None else args.lr,
        schedule_accumulation=recipe.published_accumulation,
        max_steps=args.max_steps or pick("epochs") * (images // batch_size),
        ema=args.ema,
        seed=args.seed,
        **{name: pick(name) for name in FROM_RECIPE},
    )
