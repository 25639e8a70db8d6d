"""The options of the training commands; what is not given is the recipe's of model and loss."""

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

# Optimizer steps of a run from which on compilation pays on a GPU: on an H100 it took LlamaGen-L and VAR-d16
# 21 and 33 s, and saved 0.2 s of a step of 32 images.
COMPILED_FROM = 200


# fmt: off
def training_parser(
    description: str, module: str, data_option: str, data_help: str
) -> Parser:
    """Return the parser of the training command ``module``; ``data_option`` says where its data is."""
    parser = Parser(description, module)
    add, limits = parser.add_argument, partial(limits_of, TrainingConfig)
    recipe = "default: the model's recipe"
    models = [name for name, entry in ZOO.items() if entry.backbone.training_command == module]
    add_model_options(parser, models, "base|PATH|RUN[/state/step-N][:ema]|hf://ORG/REPO/FILE")
    add(data_option, required=True, type=Path, metavar="PATH", help=data_help)
    add("--output", required=True, type=Path, metavar="DIR",
        help="run folder; the same command again resumes it")
    add("--loss", choices=LOSSES, default="cca",
        help="training loss (default cca); sft is plain maximum likelihood")
    add("--recipe", choices=("with-guidance",),
        help="other defaults for --loss cca: with-guidance, for sampling with guidance on top")
    add("--beta", **limits("beta"), help=f"inverse temperature of the reward ({recipe})")
    add("--lambda", dest="lambda_", **limits("lambda_"), help=f"weight of the negatives ({recipe})")
    add("--uncond-ratio", **limits("uncond_ratio"),
        help=f"share of images trained without their class ({recipe})")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=count(),
        help=f"passes over the data, each without its incomplete last batch ({recipe})")
    length.add_argument("--max-steps", **limits("max_steps"), help="optimizer steps, instead of --epochs")
    add("--batch-size", **limits("batch_size"), help=f"global batch in images, over all processes ({recipe})")
    add("--micro-batch-size", type=count(),
        help="images of one forward pass in one process (default: what fits a GPU's memory; "
        "on CPUs, with --deterministic and fsdp as published on 8 GPUs; mini: 32; resumed: as before)")
    add("--lr", **limits("lr"), help=f"peak learning rate ({recipe}; VAR: in proportion to --batch-size)")
    add("--warmup", **limits("warmup"), help=f"fraction of the run with rising rate ({recipe})")
    add("--final-lr", **limits("final_lr"), help=f"last rate over peak rate; 1 keeps it constant ({recipe})")
    add("--weight-decay", **limits("weight_decay"), help=f"AdamW weight decay ({recipe})")
    add("--final-weight-decay", **limits("final_weight_decay"),
        help=f"weight decay at the end, reached along a cosine ({recipe}: constant but for var-d30)")
    add("--grad-clip", **limits("grad_clip"),
        help=f"largest norm of the gradient of the global batch's mean loss ({recipe})")
    add("--ema", **limits("ema"), default=0.0, metavar="DECAY",
        help="also keep and write an average of the weights, e.g. 0.999 (default 0: none)")
    add("--dtype", **limits("dtype"),
        help=f"precision of the forward pass; float16 scales the loss ({recipe})")
    add("--parallel", choices=("ddp", "fsdp"),
        help=f"replicate the model in each process, or shard it ({recipe})")
    add("--compile", action=argparse.BooleanOptionalAction,
        help=f"compile blocks and likelihood (default: on GPUs for {COMPILED_FROM:,} steps or more)")
    add("--checkpointing", action="store_true",
        help="keep no activations of the blocks, compute them again in the backward pass")
    add("--deterministic", action="store_true",
        help="compute so that a run on GPUs can be repeated bit for bit, more slowly")
    add_workers_option(parser)
    add("--seed", **limits("seed"), default=0,
        help="seed of data order, crops, null-class draws and dropout (default 0)")
    add("--save-every", type=count(), default=100, help="steps between saved states (default 100)")
    add("--keep-states", type=count(), metavar="N",
        help="newest saved states to keep, e.g. to sample from (default 1; resumed: as before)")
    add("--log-every", type=count(), default=10,
        help="steps between updates of the shown metrics (default 10)")
    add("--report-to", choices=REPORT_TO, default="tensorboard",
        help="where metrics go besides metrics.jsonl (default tensorboard); wandb: Weights & Biases, with "
        "requirements-wandb.txt")
    add("--sample-every", type=count(0), default=0,
        help="steps between guidance-free sample grids in DIR/samples (default 0: none)")
    add_dry_run_option(parser)
    return parser


# fmt: on

FROM_RECIPE = (
    "beta", "lambda_", "uncond_ratio", "weight_decay", "final_weight_decay", "grad_clip", "warmup",
    "final_lr", "dtype",
)  # fmt: skip


def chosen_recipe(args: argparse.Namespace, entry: ZooEntry) -> Recipe:
    """The defaults of a run; raises UserError where there are none and the user gives no values either,
    or gives one that the loss does not have."""
    used = LOSSES[args.loss].hyperparameters
    for name in ("beta", "lambda_"):
        if name not in used and getattr(args, name) is not None:
            raise UserError(f"--{name.rstrip('_')}: plays no part in --loss {args.loss}; leave it out")
    if args.recipe is not None:
        if args.loss != "cca" or args.recipe not in entry.recipes:
            raise UserError(
                f"--recipe: there is none named {args.recipe} for {args.model} and --loss {args.loss}"
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
    """The recipe with what the user gave instead; raises UserError for a batch larger than the data."""

    def pick(name: str):
        given = getattr(args, name)
        return getattr(recipe, name) if given is None else given

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
