"""Make a reference .npz for eval_fid.py from images, in the layout of guided-diffusion's.

    python -m scripts.make_reference --images imagenet/train --image-size 256 --output imagenet256.npz

Writes mu, sigma (pooled features of all images), mu_s, sigma_s (spatial ones, for sFID) and arr_0:
some of the images, uint8 [n, H, W, 3], for precision and recall. torchrun shares the work.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cca.cli.main import play, run_command
from cca.cli.output import Output, OutputStatus, check_space
from cca.cli.parser import Parser, count
from cca.cli.plan import add_dry_run_option
from cca.data.image_folders import add_orientation_option, check_orientation_option, is_image_folder
from cca.data.image_sets import ImageSet, open_image_set
from cca.distributed import Ranks
from cca.evaluation.evaluator import extract_batches
from cca.evaluation.features import add_features_options, features_plan, make_extractor
from cca.evaluation.metrics import RunningGaussian
from cca.evaluation.references import REFERENCE_IMAGES
from cca.random_streams import DATA_ORDER, stream
from models.utils.errors import UserError
from models.utils.files import size_text, write_binary
from models.zoo.hub import Download

STATISTICS_BYTES = sum(8 * (width**2 + width) for width in (2048, 2023))  # of Inception's features


def total(running: RunningGaussian, ranks: Ranks) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] of the features of all ranks."""
    fit, count = running.fit(), running.count
    # Sums about zero add up over ranks; float64 leaves 16 digits for features of order one.
    second = fit.sigma * (count - 1) + count * np.outer(fit.mu, fit.mu)
    count, first, second = (
        ranks.all_reduce(torch.from_numpy(np.asarray(x, np.float64)).to(ranks.device)).cpu().numpy()
        for x in (count, count * fit.mu, second)
    )
    mean = first / count
    return mean, (second - count * np.outer(mean, mean)) / (count - 1)


def make_parser() -> Parser:
    parser = Parser(__doc__, "scripts.make_reference")
    add = parser.add_argument
    add("--images", required=True, type=Path, metavar="FILE.npz|FOLDER|ARCHIVE", help="the images")
    add(
        "--image-size",
        type=count(),
        help="cut images of a folder to squares of this side (default: they are squares already)",
    )
    add_orientation_option(parser)
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


@dataclass
class Reference:
    """A reference to be made, resolved from the options."""

    args: argparse.Namespace
    ranks: Ranks
    found: OutputStatus
    images: ImageSet
    downloads: list[Download]
    parts: None = None  # its output has none

    def identity(self) -> dict:
        args = self.args
        kept = min(args.kept_images, len(self.images))
        return {
            "images": len(self.images),
            "image_size": args.image_size,
            "exif_orientation": args.exif_orientation,
            "kept": kept,
            "seed": args.seed,
        }

    def plan(self) -> dict[str, str]:
        args, images = self.args, self.images
        size = self.identity()["kept"] * math.prod(images.size) * 3
        if not self.found.is_finished:
            check_space(output_of(args), size + STATISTICS_BYTES, "images and statistics")
        return {
            "images": f"{args.images}, {len(images):,} images",
            "features": features_plan(args.features, args.inception_weights)[0],
            "device": f"{self.ranks.devices}, batch {args.batch_size}",
            "writes": f"{args.output}, with {self.identity()['kept']:,} of the images (~{size_text(size)})",
        }

    def prepare(self) -> dict:
        args = self.args
        self.extractor = make_extractor(args.features, args.inception_weights, self.ranks)
        features = {"features": self.extractor.name, "features_sha256": self.extractor.weights_sha256}
        found = self.ranks.digest(self.images.fingerprint)
        self.content = {"options": {**self.identity(), **features, "images_sha256": found}}
        return self.content

    def work(self) -> bool:
        """Extract the features; rank 0 writes the output. Raises UserError."""
        args, images, ranks = self.args, self.images, self.ranks
        chosen = set(stream(args.seed, DATA_ORDER).permutation(len(images))[: args.kept_images].tolist())
        kept, pooled, spatial = [], RunningGaussian(), RunningGaussian()
        index = ranks.share(len(images)).start
        for batch, found in extract_batches(images, self.extractor, args.batch_size, ranks):
            pooled.add(found.pooled.numpy())
            if found.spatial is not None:
                spatial.add(found.spatial.numpy())
            kept.append(batch[[i - index for i in range(index, index + len(batch)) if i in chosen]])
            index += len(batch)
        arrays = dict(zip(("mu", "sigma"), total(pooled, ranks)))
        if spatial.count:
            arrays |= zip(("mu_s", "sigma_s"), total(spatial, ranks))
        gathered = ranks.gather(torch.from_numpy(np.concatenate(kept)))
        if gathered is not None:  # rank 0 has the images of all
            arrays["arr_0"] = gathered.numpy()
            for note in images.notes():
                print(f"note: {note}", file=sys.stderr)
            output_of(args).describe({**self.content, "command": ranks.command(args.command)})
            write_binary(args.output, lambda file: np.savez(file, **arrays))
            print(f"{args.output}: statistics of {len(images):,} images, {len(gathered):,} of them kept")
        return True


def resolve(args: argparse.Namespace, ranks: Ranks, found: OutputStatus) -> Reference:
    """Open the images. Raises UserError."""
    if args.image_size and not is_image_folder(args.images):
        raise UserError("--image-size: cuts images of a folder; those of an .npz are taken as they are")
    check_orientation_option(args, args.images)
    images = open_image_set(args.images, args.image_size, args.workers, upright=args.exif_orientation)
    if len(images) < 2 * ranks.world_size:
        raise UserError(
            f"--images: {args.images} holds {len(images)} images; at least {2 * ranks.world_size} are needed"
        )
    return Reference(args, ranks, found, images, features_plan(args.features, args.inception_weights)[1])


def output_of(args: argparse.Namespace) -> Output:
    return Output.file(args.output, "a reference")


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    output = output_of(args)
    output.check_place({"--images": args.images}, suffix=".npz")
    play(args, output, resolve)


if __name__ == "__main__":
    run_command(main)
