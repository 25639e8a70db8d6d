"""Make a reference .npz for eval_fid.py from images, in guided-diffusion's layout.

    python -m scripts.make_reference --images imagenet/train --image-size 256 --output imagenet256.npz

Writes mu and sigma (pooled features of all images), mu_s and sigma_s (spatial features, for sFID) and arr_0
(some of the images, uint8 [n, H, W, 3], for precision and recall). Under torchrun the ranks share the work.
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


def reduce_statistics(running: RunningGaussian, ranks: Ranks) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [D] and the covariance [D, D] of the features of all ranks."""
    fit, count = running.fit(), running.count
    # Second moments about zero can be summed over ranks. In float64 they keep 16 digits, enough for features
    # of order one.
    second = fit.sigma * (count - 1) + count * np.outer(fit.mu, fit.mu)
    count, first, second = (
        ranks.all_reduce(torch.from_numpy(np.asarray(x, np.float64)).to(ranks.device)).cpu().numpy()
        for x in (count, count * fit.mu, second)
    )
    mean = first / count
    return mean, (second - count * np.outer(mean, mean)) / (count - 1)


def make_parser() -> Parser:
    parser = Parser(__doc__, "scripts.make_reference")
    add = parser.group("data").add_argument
    add(
        "--images",
        required=True,
        type=Path,
        metavar="FILE.npz|FOLDER|ARCHIVE",
        help="images of the reference",
    )
    add(
        "--image-size",
        type=count(),
        help="resolution to which images of a folder are resized and centre-cropped, in pixels "
        "(default: no resizing; the images must be of one size)",
    )
    add_orientation_option(parser.group("data"))

    add_features_options(parser)
    add = parser.group("method").add_argument
    add(
        "--kept-images",
        type=count(),
        default=REFERENCE_IMAGES,
        help="randomly chosen images to keep in arr_0 (default: %(default)s)",
    )
    add("--seed", type=count(0), default=0, help="random seed of the choice of images (default: 0)")

    add = parser.group("output").add_argument
    add("--output", required=True, type=Path, metavar="FILE.npz", help="file to write")
    add_dry_run_option(parser)
    return parser


@dataclass
class Reference:
    """The job of making a reference, resolved from the options."""

    args: argparse.Namespace
    ranks: Ranks
    status: OutputStatus
    images: ImageSet
    downloads: list[Download]
    parts: None = None  # the output is one file

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
        if not self.status.is_finished:
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
        images_sha256 = self.ranks.digest(self.images.fingerprint)
        return {"options": {**self.identity(), **features, "images_sha256": images_sha256}}

    def work(self, content: dict) -> bool:
        """Extract the features; rank 0 writes the output. Raises UserError."""
        args, images, ranks = self.args, self.images, self.ranks
        is_kept = np.zeros(len(images), bool)
        is_kept[stream(args.seed, DATA_ORDER).permutation(len(images))[: args.kept_images]] = True
        kept_images, pooled, spatial = [], RunningGaussian(), RunningGaussian()
        index = ranks.share(len(images)).start
        for batch, features in extract_batches(images, self.extractor, args.batch_size, ranks):
            pooled.add(features.pooled.numpy())
            if features.spatial is not None:
                spatial.add(features.spatial.numpy())
            kept_images.append(batch[is_kept[index : index + len(batch)]])
            index += len(batch)
        arrays = dict(zip(("mu", "sigma"), reduce_statistics(pooled, ranks)))
        if spatial.count:
            arrays |= zip(("mu_s", "sigma_s"), reduce_statistics(spatial, ranks))
        all_kept = ranks.gather(torch.from_numpy(np.concatenate(kept_images)))
        if all_kept is not None:  # on rank 0
            arrays["arr_0"] = all_kept.numpy()
            for note in images.notes():
                print(f"note: {note}", file=sys.stderr)
            output_of(args).describe({**content, "command": ranks.command(args.command)})
            write_binary(args.output, lambda file: np.savez(file, **arrays))
            print(f"{args.output}: statistics of {len(images):,} images, {len(all_kept):,} of them kept")
        return True


def resolve(args: argparse.Namespace, ranks: Ranks, status: OutputStatus) -> Reference:
    """Open the images, and return the job. Raises UserError."""
    if args.image_size and not is_image_folder(args.images):
        raise UserError(
            f"--image-size: applies to a folder of images, and {args.images} is none; leave it out"
        )
    check_orientation_option(args, args.images)
    images = open_image_set(args.images, args.image_size, args.workers, upright=args.exif_orientation)
    if len(images) < 2 * ranks.world_size:
        raise UserError(
            f"--images: {args.images} holds {len(images)} images; at least {2 * ranks.world_size} are needed"
        )
    return Reference(args, ranks, status, images, features_plan(args.features, args.inception_weights)[1])


def output_of(args: argparse.Namespace) -> Output:
    return Output.file(args.output, "a reference")


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    output = output_of(args)
    output.check_place({"--images": args.images}, suffix=".npz")
    play(args, output, resolve)


if __name__ == "__main__":
    run_command(main)
