"""Encode labelled images with a model's tokenizer, once, as packed codes. LlamaGen trains on codes.

    python -m scripts.extract_codes --model llamagen-mini \\
        --data assets/fashion-mnist-train-10k.npz --output runs/codes
    torchrun --nproc_per_node 8 -m scripts.extract_codes --model llamagen-b \\
        --data imagenet --output codes384_ten_crop
    torchrun --nproc_per_node 8 -m scripts.extract_codes --model llamagen-b \\
        --data imagenet --crop-range 1.05 --output codes384_ten_crop_105

Writes DIR/codes.npy uint16 [N, crops, L], DIR/labels.npy int64 [N] and, last, DIR/header.json: a folder with
a header is complete. Each image of a folder gives ten crops, as in LlamaGen's training. Images of an .npz are
encoded as they are. Run the same command again to resume after an interruption. Training samples half of its
crops from DIR_105 if that folder lies beside DIR.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import compress, islice
from pathlib import Path

import numpy as np
import torch

from cca.cli.main import play, run_command
from cca.cli.output import Output, OutputStatus
from cca.cli.parser import Parser, add_model_options, add_workers_option, count, number
from cca.cli.parts import Parts, make_in_parts, write_npy
from cca.cli.plan import add_dry_run_option
from cca.data.datasets import DATA_HELP, LabelledDataset, open_labelled_images
from cca.data.image_folders import add_orientation_option, check_orientation_option
from cca.data.labels import add_classes_option, read_classes
from cca.data.reading import read_items
from cca.distributed import Ranks
from cca.training.encoding import to_tokens
from cca.training.unreadable import NOTED, Unreadable
from models.base import ARImageModel
from models.transforms import TenCrops
from models.utils.files import read_json, size_text, write_binary, write_json
from models.utils.precision import DOES_NOT_FIT, oom_as_user_error
from models.zoo.checkpoint_formats import tensors_sha256
from models.zoo.loading import ModelFiles, find_files
from models.zoo.registry import ZOO

CHUNK = 1024  # images per part
NOTES = ".unreadable-{}.json"  # one per rank, beside the parts; the header gets the notes of all ranks


def make_parser() -> Parser:
    parser = Parser(__doc__, "scripts.extract_codes")
    add_model_options(parser, ZOO, None)

    data = parser.group("data")
    data.add_argument("--data", required=True, type=Path, metavar="PATH", help=DATA_HELP)
    add_classes_option(data)
    add_orientation_option(data)
    data.add_argument(
        "--crop-range",
        type=number(1, 2),
        default=1.1,
        help="resolution of the centre crop, from which the ten crops are cut, divided by the image size, "
        "1 to 2 (default: %(default)s)",
    )

    parser.group("performance").add_argument(
        "--batch-size",
        type=count(),
        default=128,
        help="crops to read before they are encoded, in batches that fit in GPU memory "
        "(default: %(default)s)",
    )
    add_workers_option(parser)

    parser.group("output").add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="folder of codes to write"
    )
    add_dry_run_option(parser)
    return parser


def read_crops(
    source: LabelledDataset, ranges: list[range], workers: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Yield the pixels [n, crops, 3, H, W] uint8 of these ranges of images, in order, and replaced indices.

    The indices are those of unreadable images, which other images replace. The n images have at least
    ``batch_size`` crops together; a piece is smaller where a range ends.
    """
    items = read_items(source, [(0, index) for part in ranges for index in part], workers)
    count = math.ceil(batch_size / source.crops)
    for indices in (part[i : i + count] for part in ranges for i in range(0, len(part), count)):
        images, replaced = zip(*islice(items, len(indices)))
        pixels = torch.stack(images).view(len(images), source.crops, *images[0].shape[-3:])
        yield pixels, list(compress(indices, replaced))


@dataclass
class Extraction:
    """The job of encoding images, resolved from the options and the status of the output."""

    args: argparse.Namespace
    ranks: Ranks
    status: OutputStatus
    files: ModelFiles
    model: ARImageModel
    source: LabelledDataset

    def __post_init__(self) -> None:
        self.output = Output.codes(self.args.output)
        shape = (len(self.source), self.source.crops, self.model.sequence_length)
        self.parts = Parts(self.output.parts_folder, shape, np.dtype("<u2"), CHUNK)
        self.downloads = self.files.downloads(self.model)

    def identity(self) -> dict:
        return {
            "image_size": self.model.image_size,
            "vocab_size": self.model.vocab_size,
            "images": len(self.source),
            "crops": self.source.crops,
            "crop_range": self.args.crop_range if self.source.crops > 1 else None,
            "classes": self.source.classes,
            "exif_orientation": self.source.exif_orientation,
            **{key: value for key, value in self.files.provenance().items() if key == "tokenizer_sha256"},
        }

    def plan(self) -> dict[str, str]:
        args, source = self.args, self.source
        crops = f", {source.crops} crops of each" if source.crops > 1 else ""
        size = size_text(len(source) * self.parts.row_bytes)
        return self.files.plan(self.model) | {
            "data": f"{source.source.root if source.source else args.data}, {len(source):,} images{crops}",
            "device": self.ranks.devices,
            "writes": f"{args.output}/ (codes.npy ~{size}, labels.npy, header.json)",
        }

    def prepare(self) -> dict:
        self.files = self.files.load_into(self.model)
        return {
            **self.identity(),
            "tokenizer_tensors_sha256": tensors_sha256(self.model.tokenizer),
            "data_sha256": self.ranks.digest(self.source.fingerprint),
        }

    def make(self, ranges: list[range]) -> Iterator[np.ndarray]:
        """Yield the codes [n, crops, L] of these ranges of images, in order."""
        args, device = self.args, self.ranks.device
        with oom_as_user_error(f"--model: the tokenizer of {self.args.model} {DOES_NOT_FIT}"):
            self.model.tokenizer.to(device)
            for pixels, replaced in read_crops(self.source, ranges, args.workers, args.batch_size):
                if replaced:
                    self.note(replaced)
                batches = pixels.flatten(0, 1).split(args.batch_size)
                tokens = torch.cat([to_tokens(self.model, batch, device) for batch in batches])
                yield tokens.unflatten(0, pixels.shape[:2]).cpu().numpy()

    def begin_notes(self) -> None:
        """Load the notes on unreadable images, and correct them for parts that will be encoded again."""
        self.unreadable = Unreadable(self.source, self.ranks)
        missing = self.ranks.broadcast_from_rank0(lambda: [part.start for part in self.parts.missing()])
        for name, index in self.unreadable.places.items():
            if index - index % self.parts.rows_per_part in missing:
                self.unreadable.noted[name]["replaced"] = name in self.unreadable.counted
        self.own = self.unreadable.noted.copy() if self.ranks.is_main else {}
        self.ranks.run_or_abort_all(self.replace_notes, on_rank0=True)

    def replace_notes(self) -> None:
        kept = self.output.parts_folder / NOTES.format(0)
        if self.own:
            write_json(kept, self.own)
        for path in self.output.parts_folder.glob(NOTES.format("*")):
            if not self.own or path != kept:
                path.unlink()

    def note(self, replaced: list[int]) -> None:
        """Write down which images were replaced, before their part is stored. Raises UserError for too many.

        The limit counts the images of all ranks.
        """
        entries = self.unreadable.add(replaced)
        self.unreadable.report(entries)
        self.own |= entries
        write_json(self.output.parts_folder / NOTES.format(self.ranks.rank), self.own)
        of_others = read_notes(self.output.parts_folder)
        self.unreadable.counted |= of_others.keys() - self.unreadable.noted.keys()
        self.unreadable.noted |= of_others
        self.unreadable.check()

    def work(self, header: dict) -> bool:
        """Encode the missing parts; rank 0 writes the folder. Return False if a signal stopped the run."""
        self.begin_notes()
        if self.ranks.is_main:
            for note in self.source.notes():
                print(f"note: {note}", file=sys.stderr)
        return make_in_parts(self.ranks, self.parts, self.make, partial(self.finish, header), "encoding")

    def finish(self, header: dict) -> None:
        """Write the labels, then the codes, then the header, which marks them as complete."""
        labels = self.source.labels(np.arange(len(self.source))).numpy()
        write_binary(self.args.output / "labels.npy", lambda file: np.save(file, labels))
        write_npy(self.args.output / "codes.npy", self.parts)
        notes = read_notes(self.output.parts_folder)
        self.output.describe({**header, NOTED: notes} if notes else header)


def read_notes(parts: Path) -> dict[str, dict]:
    """Return the notes of all ranks on unreadable images. Raises UserError for a damaged file."""
    paths = sorted(parts.glob(NOTES.format("*")))
    return {name: entry for path in paths for name, entry in read_json(path).items()}


def resolve(args: argparse.Namespace, ranks: Ranks, status: OutputStatus) -> Extraction:
    files = find_files(args.model, None, args.tokenizer_weights, args.image_size)
    model = files.build()
    transform, classes = TenCrops(model.image_size, args.crop_range), read_classes(args.classes_from)
    source = open_labelled_images(
        args.data, model, transform=transform, classes=classes, upright=args.exif_orientation
    )
    job = Extraction(args, ranks, status, files, model, source)
    if source.source and status.content:
        notes = status.options.get(NOTED, {})
        if not status.is_finished:
            notes = ranks.broadcast_from_rank0(partial(read_notes, job.output.parts_folder))
        source.source.resume(notes)
    return job


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    check_orientation_option(args, args.data)
    output = Output.codes(args.output)
    output.check_place({"--data": args.data})
    play(args, output, resolve)


if __name__ == "__main__":
    run_command(main)
