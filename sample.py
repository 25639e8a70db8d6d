"""Sample images from a VAR or LlamaGen model, without guidance unless asked, into one .npz.

    python sample.py --model var-mini --num-samples 1000 --output samples.npz --grid grid.png
    python sample.py --model var-mini --weights runs/var-mini-cca/model.pth --num-samples 1000 --output cca.npz
    torchrun --nproc_per_node 2 sample.py --model llamagen-mini --cfg-scale 1.5 --output guided.npz

FILE.npz holds arr_0 uint8 [N, H, W, 3] and arr_1 int64 [N] (classes); FILE.json beside it holds
every option, the weights' SHA-256, versions and images per second. An interrupted run, started
again with the same command, goes on where it stopped.
"""

from pathlib import Path

import numpy as np
import torch
from torchvision.utils import save_image

from cca.distributed import Processes
from cca.errors import UserError, run_command
from cca.options import Parser, count, number
from cca.sampler import SampleRequest, run_sampling
from models.base import ARImageModel, SamplingOptions
from models.checkpoints import atomic_write
from models.zoo import ZOO, load_files, locate


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, choices=sorted(ZOO), help="model to sample from")
    add("--weights", default="base", metavar="base|cca|PATH", help="transformer weights (default base)")
    add("--tokenizer-weights", metavar="PATH|NAME", help="tokenizer weights, or vq_ds16_c2i, vq_ds8_c2i for LlamaGen (default: the model's own)")
    add("--image-size", type=count(), metavar="PIXELS", help="side the model works at; LlamaGen: 256, 384 or 512 (default: the model's)")
    add("--num-samples", type=count(), default=50_000, help="images (default 50000)")
    add("--classes", default="all", metavar="all|0,7,8", help="classes to sample (default all)")
    add("--class-order", choices=("balanced", "random"), default="balanced", help="classes in turn, or drawn uniformly (default balanced)")
    add("--cfg-scale", type=number(0), default=1.0, help="guidance scale s: uncond + s (cond - uncond); 1 is guidance-free (default 1.0)")
    add("--cfg-schedule", choices=("constant", "linear"), help="scale over the decoding steps (default: VAR linear, LlamaGen constant)")
    add("--cfg-interval", type=count(), help="guide only the first this many steps (LlamaGen: tokens, VAR: levels; default all)")
    add("--top-k", type=count(0), default=0, help="keep the k likeliest tokens; 0 keeps all (default 0)")
    add("--top-p", type=number(0, 1, above=True), default=1.0, help="keep the likeliest tokens with this much probability (default 1.0)")
    add("--temperature", type=number(0, above=True), default=1.0, help="divides the logits (default 1.0)")
    add("--eval-size", type=count(), help="resize to this side, bicubic, before the 8-bit conversion (pixels; default: no resizing)")
    add("--seed", type=count(0), default=0, help="seed of classes and tokens (default 0)")
    add("--batch-size", type=count(), default=64, help="images decoded at once in one process (default 64)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="precision (default float32)")
    add("--output", required=True, type=Path, metavar="FILE.npz", help="where the samples go")
    add("--grid", type=Path, metavar="FILE.png", help="also write a picture of the first images")
    return parser


def parse_classes(text: str, model: ARImageModel) -> tuple[int, ...]:
    if text == "all":
        return tuple(range(model.num_classes))
    try:
        classes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--classes: {text!r} is neither 'all' nor a list such as 0,7,8") from None
    if not all(0 <= c < model.num_classes for c in classes):
        raise UserError(f"--classes: {text} goes beyond 0 … {model.num_classes - 1}")
    return classes


def write_grid(samples: Path, path: Path, columns: int) -> None:
    """PNG of the first rows of images; in balanced order each column is one class."""
    columns = min(columns, 16)
    with np.load(samples) as file:
        images = torch.from_numpy(file["arr_0"][: 8 * columns]).permute(0, 3, 1, 2)
    atomic_write(path, lambda temporary: save_image(images.float() / 255, temporary, format="png", nrow=columns))


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    for option, path, suffix in (("--output", args.output, ".npz"), ("--grid", args.grid, ".png")):
        if path and path.suffix != suffix:
            raise UserError(f"{option}: {path} does not end in {suffix}")
    files = locate(args.model, args.weights, args.tokenizer_weights, args.image_size)
    model = load_files(files)
    schedule = args.cfg_schedule or model.default_cfg_schedule
    sampling = SamplingOptions(args.cfg_scale, schedule, args.cfg_interval, args.top_k, args.top_p, args.temperature)
    classes = parse_classes(args.classes, model)
    request = SampleRequest(args.num_samples, classes, args.class_order, args.seed, args.eval_size, args.dtype, sampling)
    for path in filter(None, (args.output, args.grid)):
        path.parent.mkdir(parents=True, exist_ok=True)
    processes = Processes()
    run_sampling(model, request, args.batch_size, args.output, files.describe(), processes)
    if args.grid and processes.main:
        write_grid(args.output, args.grid, len(classes))


if __name__ == "__main__":
    run_command(main)
