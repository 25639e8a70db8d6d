"""What ``train_var_cca.py`` and ``train_llamagen_cca.py`` share: options, defaults, the run."""

import argparse
from collections.abc import Callable
from pathlib import Path

from cca.data import TokenSource
from cca.distributed import Processes
from cca.errors import UserError
from cca.losses import LOSSES
from cca.options import Parser, count, number
from cca.trainer import DTYPES, RunFolder, TrainingConfig, describe, train
from models.base import ARImageModel
from models.zoo import ZOO, Recipe, load_files, locate, zoo_entry


def make_parser(description: str, backbone: str, data_option: str, data_help: str) -> Parser:
    parser = Parser(description)
    names = [name for name, entry in ZOO.items() if entry.backbone == backbone]
    add = parser.add_argument
    add("--model", required=True, choices=names, help="model to fine-tune")
    add("--weights", default="base", metavar="base|PATH", help="pretrained weights to start from (default base)")
    add("--tokenizer-weights", metavar="PATH", help="tokenizer weights (default: the model's own)")
    add(data_option, required=True, type=Path, metavar="PATH", help=data_help)
    add("--output", required=True, type=Path, metavar="DIR", help="run folder; the same command again resumes it")
    add("--loss", choices=LOSSES, default="cca", help="training loss (default cca); sft is plain maximum likelihood")
    recipe = "default: the model's recipe"
    add("--beta", type=number(0, above=True), help=f"inverse temperature of the reward ({recipe})")
    add("--lambda", dest="lam", type=number(0), help=f"weight of the negatives ({recipe})")
    add("--uncond-ratio", type=number(0, 1), help=f"share of images trained without their class ({recipe})")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=count(), help=f"passes over the data ({recipe})")
    length.add_argument("--max-steps", type=count(), help="optimizer steps, instead of --epochs")
    add("--batch-size", type=count(), help=f"global batch in images, over all processes ({recipe})")
    add("--micro-batch-size", type=count(), help="images of one forward pass in one process (default: all at once)")
    add("--lr", type=number(0), help=f"peak learning rate ({recipe})")
    add("--warmup", type=number(0, 1), help=f"fraction of the run with rising rate ({recipe})")
    add("--final-lr", type=number(0, 1), help=f"last rate over peak rate; 1 keeps it constant ({recipe})")
    add("--weight-decay", type=number(0), help=f"AdamW weight decay ({recipe})")
    add("--grad-clip", type=number(0, above=True), help=f"largest gradient norm ({recipe})")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="precision of the forward pass (default float32)")
    add("--seed", type=count(0), default=0, help="seed of data order, null-class draws and dropout (default 0)")
    add("--save-every", type=count(), default=100, help="steps between saved states (default 100)")
    add("--log-every", type=count(), default=10, help="steps between updates of the shown metrics (default 10)")
    return parser


def training_config(args: argparse.Namespace, recipe: Recipe, images: int, scale_lr: bool) -> TrainingConfig:
    """The recipe with what the user gave instead."""

    def pick(name: str):
        given = getattr(args, name)
        return getattr(recipe, name) if given is None else given

    batch_size = pick("batch_size")
    if batch_size > images:
        raise UserError(f"--batch-size: {batch_size} is more than the {images} images of the data")
    default_lr = recipe.lr * (batch_size / recipe.batch_size if scale_lr else 1)
    return TrainingConfig(
        loss=args.loss,
        beta=pick("beta"),
        lam=pick("lam"),
        uncond_ratio=pick("uncond_ratio"),
        batch_size=batch_size,
        lr=default_lr if args.lr is None else args.lr,
        weight_decay=pick("weight_decay"),
        grad_clip=pick("grad_clip"),
        warmup=pick("warmup"),
        final_lr=pick("final_lr"),
        schedule_accumulation=recipe.published_accumulation,
        max_steps=args.max_steps or pick("epochs") * (images // batch_size),
        seed=args.seed,
        dtype=args.dtype,
    )


def run_training(args: argparse.Namespace, backbone: str, path: Path, open_data: Callable[[Path, ARImageModel, int], TokenSource]) -> None:
    """Load model and data, then train; ``open_data`` takes path, model and seed."""
    entry = zoo_entry(args.model, backbone)
    if args.weights == "cca":
        raise UserError("--weights: training starts from base or from a path")
    files = locate(args.model, args.weights, args.tokenizer_weights)
    model = load_files(files)
    data = open_data(path, model, args.seed)
    config = training_config(args, entry.recipe, len(data.labels), scale_lr=backbone == "var")
    processes = Processes()
    if config.batch_size < processes.world:
        raise UserError(f"--batch-size: {config.batch_size} is less than the {processes.world} processes")
    provenance = {**files.describe(), "data": str(path), "images": len(data.labels)}
    folder = RunFolder(args.output, processes, describe(config, provenance))
    micro = args.micro_batch_size or config.batch_size
    train(model, data, config, micro, folder, processes, args.save_every, args.log_every)
