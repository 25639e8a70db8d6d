"""Encode and decode images with a model's tokenizer, to measure what the tokenizer alone loses (rFID).

    python -m scripts.reconstruct --model var-d16 --images imagenet/val --output reconstructed.npz
    python eval_fid.py --samples reconstructed.npz --reference imagenet/val --resize 256
    torchrun --nproc_per_node 8 -m scripts.reconstruct --model llamagen-b --images ... --output ...

The images come from an .npz, at the model's resolution, or from a folder, whose images are resized and
centre-cropped as in guided-diffusion. Writes FILE.npz in the same order (arr_0 uint8 [N, H, W, 3]; arr_1, the
classes, if the images' .npz has them), and FILE.json with the tokenizer's hash.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cca.cli.main import play, run_command
from cca.cli.output import Output, OutputStatus
from cca.cli.parser import Parser, add_model_options, add_workers_option, count
from cca.cli.parts import Parts, make_in_parts, write_npz
from cca.cli.plan import add_dry_run_option
from cca.data.image_folders import add_orientation_option, check_orientation_option
from cca.data.image_sets import ImageSet, open_image_set, to_uint8_tensor
from cca.distributed import Ranks
from cca.sampling.sampler import decoding_batch_size, to_pixels
from cca.training.encoding import encoding_batch_size, to_tokens
from models.base import ARImageModel
from models.utils.errors import UserError
from models.utils.files import size_text
from models.utils.precision import DOES_NOT_FIT, oom_as_user_error
from models.zoo.checkpoint_formats import tensors_sha256
from models.zoo.loading import ModelFiles, find_files
from models.zoo.registry import ZOO

PART_IMAGES = 256  # images per part


def make_parser() -> Parser:
    parser = Parser(__doc__, "scripts.reconstruct")
    add_model_options(parser, ZOO, None)

    data = parser.group("data")
    data.add_argument(
        "--images", required=True, type=Path, metavar="FILE.npz|FOLDER|ARCHIVE", help="images to reconstruct"
    )
    add_orientation_option(data)

    parser.group("performance").add_argument(
        "--batch-size",
        type=count(),
        default=32,
        help="images per batch and rank, rounded up to full batches of the encoder and the decoder "
        "(default: %(default)s)",
    )
    add_workers_option(parser)

    parser.group("output").add_argument(
        "--output", required=True, type=Path, metavar="FILE.npz", help="file to write"
    )
    add_dry_run_option(parser)
    return parser


@dataclass
class Reconstruction:
    """The job of reconstructing images, resolved from the options and the status of the output."""

    args: argparse.Namespace
    ranks: Ranks
    status: OutputStatus
    files: ModelFiles
    model: ARImageModel
    images: ImageSet

    def __post_init__(self) -> None:
        self.output = Output.npz(self.args.output, "reconstructions")
        shape = (len(self.images), *self.images.size, 3)
        self.parts = Parts(self.output.parts_folder, shape, np.dtype(np.uint8), PART_IMAGES)
        self.downloads = self.files.downloads(self.model)
        # Encoder and decoder always get full batches of their own sizes: an image's pixels then do not
        # depend on the images beside it.
        device = self.ranks.device
        full = math.lcm(encoding_batch_size(self.model, device), decoding_batch_size(self.model, device))
        self.batch_size = math.ceil(self.args.batch_size / full) * full

    def identity(self) -> dict:
        return {
            "model": self.args.model,
            "image_size": self.model.image_size,
            "images": len(self.images),
            "exif_orientation": self.args.exif_orientation,
        }

    def plan(self) -> dict[str, str]:
        path, size = self.output.path, size_text(len(self.images) * self.parts.row_bytes)
        return self.files.plan(self.model) | {
            "images": f"{self.args.images}, {len(self.images):,} images",
            "device": f"{self.ranks.devices}, batch {self.batch_size}",
            "writes": f"{path} (~{size}), {path.with_suffix('.json')}",
        }

    def prepare(self) -> dict:
        self.files.load_into(self.model)
        options = {
            **self.identity(),
            "images_sha256": self.ranks.digest(self.images.fingerprint),
            "tokenizer_tensors_sha256": tensors_sha256(self.model.tokenizer),
        }
        return {"options": options}

    def make(self, ranges: list[range]) -> Iterator[np.ndarray]:
        with oom_as_user_error(f"--model: the tokenizer of {self.args.model} {DOES_NOT_FIT}"):
            self.model.tokenizer.to(self.ranks.device)
            # Adjacent ranges are joined: a compressed file is read from its start for each range.
            whole = range(ranges[0].start, ranges[-1].stop) if ranges else range(0)
            for part in [whole] if len(whole) == sum(map(len, ranges)) else ranges:
                for batch in self.images.batches(slice(part.start, part.stop), self.batch_size):
                    tokens = to_tokens(self.model, to_uint8_tensor(batch), self.ranks.device, alike=True)
                    yield to_pixels(self.model, tokens, "float32")

    def work(self, content: dict) -> bool:
        """Reconstruct the missing parts; rank 0 writes the file. Return False if a signal stopped the run."""
        finish = partial(self.finish, content)
        return make_in_parts(self.ranks, self.parts, self.make, finish, "reconstructing")

    def finish(self, content: dict) -> None:
        """Write the description before the file, so that a file always has its description."""
        images, path, notes = self.images, self.output.path, self.images.notes()
        labels = images.labels()
        self.output.describe({**content, "images": str(self.args.images), "notes": notes})
        write_npz(path, self.parts, None if labels is None else [labels])
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        print(f"{path}: {len(images):,} images, encoded and decoded")


def resolve(args: argparse.Namespace, ranks: Ranks, status: OutputStatus) -> Reconstruction:
    """Open the images, and return the job. Raises UserError for images of another size."""
    files = find_files(args.model, None, args.tokenizer_weights, args.image_size)
    model = files.build()
    size = model.image_size
    images = open_image_set(args.images, size, args.workers, upright=args.exif_orientation)
    if not len(images) or images.size != (size, size):
        raise UserError(
            f"--images: {args.images} has {len(images)} images of {images.size[0]} x {images.size[1]}, "
            f"the model takes {size} x {size}"
        )
    images.labels()  # raises before the work, if the labels are wrong
    return Reconstruction(args, ranks, status, files, model, images)


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    check_orientation_option(args, args.images)
    output = Output.npz(args.output, "reconstructions")
    output.check_place({"--images": args.images}, suffix=".npz")
    play(args, output, resolve)


if __name__ == "__main__":
    run_command(main)
