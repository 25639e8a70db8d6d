"""What ``train_var_cca.py`` and ``train_llamagen_cca.py`` share: options, defaults, the run."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from cca.data import TokenSource
from cca.distributed import Processes
from cca.errors import UserError
from cca.losses import LOSSES
from cca.options import Parser, count, number
from cca.plan import TrainingConfig
from cca.run_folder import RunFolder, describe
from cca.sampler import SampleRequest, sample_images, write_grid
from cca.trainer import DTYPES, Trainer
from cca.training_loop import train
from models.base import ARImageModel, SamplingOptions
from models.zoo import ZOO, Recipe, load_files, locate, zoo_entry

GRID_ROWS, GRID_COLUMNS = 4, 10
PUBLISHED_GPUS = 8  # on which the recipes' accumulation steps were counted


def make_parser(description: str, backbone: str, data_option: str, data_help: str) -> Parser:
    parser = Parser(description)
    names = [name for name, entry in ZOO.items() if entry.backbone == backbone]
    add = parser.add_argument
    add("--model", required=True, choices=names, help="model to fine-tune")
    add(
        "--weights",
        default="base",
        metavar="base|PATH",
        help="pretrained weights to start from (default base)",
    )
    add("--tokenizer-weights", metavar="PATH|NAME", help="tokenizer weights (default: the model's own)")
    add(
        "--image-size",
        type=count(),
        metavar="PIXELS",
        help="side the model works at; LlamaGen: 256, 384 or 512 (default: the model's)",
    )
    add(data_option, required=True, type=Path, metavar="PATH", help=data_help)
    add(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="run folder; the same command again resumes it",
    )
    add(
        "--loss",
        choices=LOSSES,
        default="cca",
        help="training loss (default cca); sft is plain maximum likelihood",
    )
    recipe = "default: the model's recipe"
    add("--beta", type=number(0, above=True), help=f"inverse temperature of the reward ({recipe})")
    add("--lambda", dest="lam", type=number(0), help=f"weight of the negatives ({recipe})")
    add("--uncond-ratio", type=number(0, 1), help=f"share of images trained without their class ({recipe})")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=count(), help=f"passes over the data ({recipe})")
    length.add_argument("--max-steps", type=count(), help="optimizer steps, instead of --epochs")
    add("--batch-size", type=count(), help=f"global batch in images, over all processes ({recipe})")
    add(
        "--micro-batch-size",
        type=count(),
        help="images of one forward pass in one process (default: as published on 8 GPUs; mini: all at once)",
    )
    add("--lr", type=number(0), help=f"peak learning rate ({recipe}; VAR: times batch size / 256)")
    add("--warmup", type=number(0, 1), help=f"fraction of the run with rising rate ({recipe})")
    add("--final-lr", type=number(0, 1), help=f"last rate over peak rate; 1 keeps it constant ({recipe})")
    add("--weight-decay", type=number(0), help=f"AdamW weight decay ({recipe})")
    add(
        "--final-weight-decay",
        type=number(0),
        help=f"weight decay at the end, reached along a cosine ({recipe}: constant but for var-d30)",
    )
    add("--grad-clip", type=number(0, above=True), help=f"largest gradient norm ({recipe})")
    add(
        "--ema",
        type=number(0, 1),
        default=0.0,
        metavar="DECAY",
        help="also keep and write an average of the weights, e.g. 0.999 (default 0: none)",
    )
    add("--dtype", choices=DTYPES, help=f"precision of the forward pass; float16 scales the loss ({recipe})")
    add(
        "--parallel",
        choices=("ddp", "fsdp"),
        help=f"replicate the model in each process, or shard it ({recipe})",
    )
    add("--compile", action="store_true", help="torch.compile the transformer blocks")
    add(
        "--checkpointing",
        action="store_true",
        help="keep no activations of the blocks, compute them again in the backward pass",
    )
    add(
        "--workers",
        type=count(0),
        default=0,
        help="data loading processes of each training process (default 0: none; 8 suits image folders)",
    )
    add(
        "--seed",
        type=count(0),
        default=0,
        help="seed of data order, crops, null-class draws and dropout (default 0)",
    )
    add("--save-every", type=count(), default=100, help="steps between saved states (default 100)")
    add(
        "--log-every",
        type=count(),
        default=10,
        help="steps between updates of the shown metrics (default 10)",
    )
    add(
        "--sample-every",
        type=count(0),
        default=0,
        help="steps between guidance-free sample grids in DIR/samples (default 0: none)",
    )
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
    taken = (
        "beta",
        "lam",
        "uncond_ratio",
        "weight_decay",
        "final_weight_decay",
        "grad_clip",
        "warmup",
        "final_lr",
        "dtype",
    )
    return TrainingConfig(
        loss=args.loss,
        batch_size=batch_size,
        lr=default_lr if args.lr is None else args.lr,
        schedule_accumulation=recipe.published_accumulation,
        max_steps=args.max_steps or pick("epochs") * (images // batch_size),
        ema=args.ema,
        seed=args.seed,
        **{name: pick(name) for name in taken},
    )


def grid_drawer(trainer: Trainer, folder: Path):
    """A function that samples a grid without guidance, always from the same random numbers."""
    model, processes = trainer.model, trainer.processes
    classes = tuple(torch.linspace(0, model.num_classes - 1, GRID_COLUMNS).long().tolist())
    request = SampleRequest(
        GRID_ROWS * GRID_COLUMNS, classes, "balanced", 0, None, trainer.config.dtype, SamplingOptions()
    )

    def draw(step: int) -> None:
        if processes.main:
            model.eval()
            images = sample_images(
                model, range(request.num_samples), request, GRID_ROWS * GRID_COLUMNS, processes.device
            )
            trainer.net.train()
            folder.mkdir(exist_ok=True)
            write_grid(images.numpy(), folder / f"step-{step:06d}.png", GRID_COLUMNS)
        processes.barrier()

    return draw


def run_training(
    args: argparse.Namespace,
    backbone: str,
    path: Path,
    open_data: Callable[[Path, ARImageModel, int], TokenSource],
) -> None:
    """Load model and data, then train; ``open_data`` takes path, model and seed."""
    recipe = zoo_entry(args.model, backbone).recipe
    if args.weights == "cca":
        raise UserError("--weights: training starts from base or from a path")
    files = locate(args.model, args.weights, args.tokenizer_weights, args.image_size)
    model = load_files(files)
    data = open_data(path, model, args.seed)
    config = training_config(args, recipe, len(data), scale_lr=backbone == "var")
    processes = Processes()
    parallel = args.parallel or recipe.parallel
    if config.batch_size < processes.world:
        raise UserError(f"--batch-size: {config.batch_size} is less than the {processes.world} processes")
    if parallel == "fsdp" and config.batch_size % processes.world:
        raise UserError(
            f"--batch-size: with --parallel fsdp it must be a multiple of the {processes.world} processes, {config.batch_size} is not"
        )
    if parallel == "fsdp" and config.dtype == "float16":
        raise UserError("--dtype: --parallel fsdp takes bfloat16 or float32, not float16")
    if parallel == "fsdp" and args.sample_every and processes.world > 1:
        raise UserError(
            "--sample-every: a sharded model cannot draw samples; use --parallel ddp, or sample.py on a finished run"
        )
    provenance = {**files.describe(), "data": str(path), "images": len(data)}
    folder = RunFolder(args.output, processes, describe(config, provenance))
    published = (
        config.batch_size // (PUBLISHED_GPUS * recipe.published_accumulation)
        if recipe.published_accumulation > 1
        else config.batch_size
    )
    trainer = Trainer(
        model,
        config,
        args.micro_batch_size or max(published, 1),
        processes,
        parallel,
        args.compile,
        args.checkpointing,
    )
    draw = grid_drawer(trainer, folder.path / "samples") if args.sample_every else lambda step: None
    train(trainer, data, folder, args.save_every, args.log_every, args.workers, args.sample_every, draw)
