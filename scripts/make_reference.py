"""Make a reference .npz for eval_fid.py from images, in the layout of guided-diffusion's.

    python -m scripts.make_reference --images imagenet/train --image-size 256 --output imagenet256.npz

Writes mu, sigma (pooled features of all images), mu_s, sigma_s (spatial ones, for sFID) and arr_0:
some of the images, uint8 [n, H, W, 3], for precision and recall. torchrun shares the work.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cca.cli.main import OnePart, play, run_command
from cca.cli.output import Found, Output
from cca.cli.parser import Parser, count
from cca.cli.plan import add_dry_run_option, output_text
from cca.data.image_sets import ImageSet, open_image_set
from cca.distributed import Processes
from cca.evaluation.evaluator import extract_batches
from cca.evaluation.features import Extractor, add_features_options, features_plan
from cca.evaluation.metrics import RunningGaussian
from cca.evaluation.references import REFERENCE_IMAGES
from cca.random_streams import DATA_ORDER, stream
from models.utils.errors import UserError
from models.utils.files import write_binary


def total(running: RunningGaussian, processes: Processes) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] of the features of all ranks."""
    fit, count = running.fit(), running.count
    # Sums about zero add up over ranks; float64 leaves 16 digits for features of order one.
    second = fit.sigma * (count - 1) + count * np.outer(fit.mu, fit.mu)
    count, first, second = (
        processes.sum(torch.from_numpy(np.asarray(x, np.float64)).to(processes.device)).cpu().numpy()
        for x in (count, count * fit.mu, second)
    )
    mean = first / count
    return mean, (second - count * np.outer(mean, mean)) / (count - 1)


def make_parser() -> Parser:
    parser = Parser(__doc__, "scripts.make_reference")
    add = parser.add_argument
    add("--images", required=True, type=Path, metavar="FILE.npz|FOLDER", help="the images")
    add(
        "--image-size",
        type=count(),
        help="cut images of a folder to squares of this side (default: they are squares already)",
    )
    add_features_options(parser)
    add(
        "--kept-images",
        type=count(),
        default=REFERENCE_IMAGES,
        help="images in arr_0, drawn at random (default %(default)s)",
    )
    add("--seed", type=count(0), default=0, help="seed of the draw (default 0)")
    add("--output", required=True, type=Path, metavar="FILE.npz", help="file to write")
    add_dry_run_option(parser)
    return parser


def resolve(args: argparse.Namespace, processes: Processes, found: Found) -> OnePart:
    """Open the images, and plan what is computed of them. Raises UserError."""
    if args.image_size and not os.path.isdir(args.images):
        raise UserError("--image-size: cuts images of a folder; those of an .npz are taken as they are")
    images = open_image_set(args.images, args.image_size, args.workers)
    if len(images) < 2 * processes.world:
        raise UserError(
            f"--images: {args.images} holds {len(images)} images; at least {2 * processes.world} are needed"
        )
    features, downloads = features_plan(args.features, args.inception_weights)
    rows = {
        "images": f"{args.images}, {len(images):,} images",
        "features": features,
        "device": f"{processes.devices}, batch {args.batch_size}",
        "writes": f"{output_text(args.output)}, with {min(args.kept_images, len(images)):,} of the images",
    }
    return OnePart(rows, partial(work, args, images, processes), downloads)


def work(args: argparse.Namespace, images: ImageSet, processes: Processes) -> None:
    """Extract the features; rank 0 writes ``args.output``. Raises UserError."""
    extractor = Extractor(args.features, args.inception_weights, processes.device)
    chosen = set(stream(args.seed, DATA_ORDER).permutation(len(images))[: args.kept_images].tolist())
    kept, pooled, spatial = [], RunningGaussian(), RunningGaussian()
    index = processes.share(len(images)).start
    for batch, found in extract_batches(images, extractor, args.batch_size, processes):
        pooled.add(found.pooled.numpy())
        if found.spatial is not None:
            spatial.add(found.spatial.numpy())
        kept += [image for i, image in enumerate(batch, index) if i in chosen]
        index += len(batch)
    arrays = dict(zip(("mu", "sigma"), total(pooled, processes)))
    if spatial.count:
        arrays |= zip(("mu_s", "sigma_s"), total(spatial, processes))
    pixels = torch.from_numpy(np.stack(kept)) if kept else torch.empty(0, *images.size, 3, dtype=torch.uint8)
    gathered = processes.gather(pixels)
    if gathered is None:  # rank 0 has the images of all
        return
    for note in images.notes():
        print(f"note: {note}", file=sys.stderr)
    write_binary(args.output, lambda file: np.savez(file, arr_0=gathered.numpy(), **arrays))
    print(f"{args.output}: statistics of {len(images):,} images, {len(gathered):,} of them kept")


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    output = Output(args.output)
    output.check_place({"--images": args.images}, suffix=".npz")
    play(args, output, resolve)


if __name__ == "__main__":
    run_command(main)
