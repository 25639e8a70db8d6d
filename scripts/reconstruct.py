"""Encode and decode images with a model's tokenizer: what is lost before a transformer says a word (rFID).

    python -m scripts.reconstruct --model var-d16 --images imagenet/val --output reconstructed.npz
    python eval_fid.py --samples reconstructed.npz --reference imagenet/val --resize 256
    torchrun --nproc_per_node 8 -m scripts.reconstruct --model llamagen-b --images ... --output ...

Images are those of an .npz at the model's size, or of a folder, which are resized and cut to it as
guided-diffusion does. Writes FILE.npz in their order (arr_0 uint8 [N, H, W, 3], arr_1 classes where the
images' .npz has them), and FILE.json with the tokenizer's hash.
"""

import math
import sys
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cca.data.image_sets import ImageSet, open_image_set, to_uint8_tensor
from cca.data.sources import encoded_at_once, to_tokens
from cca.distributed import Processes
from cca.sampling.sampler import decoded_at_once, to_pixels
from models.base import ARImageModel
from models.devices import DOES_NOT_FIT, memory_named
from models.errors import UserError, run_command
from models.files import atomic_write, write_json
from models.loading import find_files
from models.options import Parser, add_model_options, add_workers_option, count
from models.outputs import check_output
from models.plan import add_dry_run_option, output_text, show_plan, size_text
from models.weights import tensors_sha256
from models.zoo import ZOO

COPIED = 2**24  # bytes moved at once


def make_parser() -> Parser:
    parser = Parser(__doc__, "scripts.reconstruct")
    add = parser.add_argument
    add_model_options(parser, ZOO, None)
    add("--images", required=True, type=Path, metavar="FILE.npz|FOLDER", help="the images")
    add(
        "--batch-size",
        type=count(),
        default=32,
        help="images read at a time, rounded up to what fills the encoder's and the decoder's batches "
        "(default %(default)s)",
    )
    add_workers_option(parser)
    add("--output", required=True, type=Path, metavar="FILE.npz", help="file to write")
    add_dry_run_option(parser)
    return parser


def reconstruct(
    model: ARImageModel, images: ImageSet, part: slice, batch_size: int, device, file, bar
) -> None:
    """Write the pixels of a range of images, encoded and decoded, to an open file.

    Encoder and decoder work on batches of their own sizes: an image's pixels depend on it alone.
    """
    for batch in images.batches(part, batch_size):
        tokens = to_tokens(model, to_uint8_tensor(batch), device, alike=True)
        file.write(to_pixels(model, tokens, "float32").numpy().tobytes())
        bar.update(len(batch))


def assemble(output: Path, parts: list[Path], shape: tuple[int, ...], labels: np.ndarray | None) -> None:
    """The processes' pixels in order, as one .npz."""

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts:
                    with open(part, "rb") as pixels:
                        while block := pixels.read(COPIED):
                            file.write(block)
            if labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, labels)

    atomic_write(output, write)


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.output.suffix != ".npz":
        raise UserError(f"--output: {args.output} does not end in .npz")
    check_output("--output", args.output, {"--images": args.images})
    files = find_files(args.model, None, args.tokenizer_weights, args.image_size)
    model = files.build()
    size = model.image_size
    images = open_image_set(args.images, size, args.workers)
    if not len(images):
        raise UserError(f"--images: {args.images} holds no images")
    if images.size != (size, size):
        raise UserError(
            f"--images: {args.images} has images of {images.size[0]} x {images.size[1]}, "
            f"the model takes {size} x {size}"
        )
    labels = images.labels()
    if labels is not None and len(labels) != len(images):
        raise UserError(f"--images: {args.images} has {len(images)} images and {len(labels)} labels")
    processes, downloads = Processes(), files.downloads(model)
    full = math.lcm(encoded_at_once(model, processes.device), decoded_at_once(model, processes.device))
    batch_size = math.ceil(args.batch_size / full) * full

    def show() -> None:
        rows = {
            "images": f"{args.images}, {len(images):,} images",
            "device": f"{processes.devices}, batch {batch_size}",
            "writes": f"{output_text(args.output)} (~{size_text(3 * len(images) * size * size)}), "
            f"{args.output.with_suffix('.json')}",
        }
        show_plan(files.plan(model, None) | rows, downloads)

    if not processes.planned(show, downloads, args.dry_run):
        return
    files.fill(model)
    tokenizer = tensors_sha256(model.tokenizer)
    too_large = f"--model: the tokenizer of {args.model} {DOES_NOT_FIT}"
    with memory_named(too_large):
        model.tokenizer.to(processes.device)
    share = processes.share(len(images))
    parts = [args.output.with_name(f".{args.output.name}.{rank}.part") for rank in range(processes.world)]
    own = parts[processes.rank]
    total = share.stop - share.start
    made_from = {"images": processes.digest(images.fingerprint), "tokenizer_tensors_sha256": tokenizer}

    def work() -> None:
        with (
            tqdm(total=total, desc="reconstructing", unit="image", disable=not processes.main) as bar,
            open(own, "wb") as file,
            memory_named(too_large),
        ):
            reconstruct(model, images, share, batch_size, processes.device, file, bar)

    with processes.holding(args.output, made_from):
        try:
            processes.agree(work)
            if processes.main:
                assemble(args.output, parts, (len(images), size, size, 3), labels)
                report = {
                    "model": args.model,
                    "image_size": size,
                    "tokenizer_tensors_sha256": tokenizer,
                    "images": {"file": str(args.images), "sha256": images.content_hash()},
                    "notes": images.notes(),
                }
                write_json(args.output.with_suffix(".json"), report)
                for note in images.notes():
                    print(f"note: {note}", file=sys.stderr)
                print(f"{args.output}: {len(images):,} images, encoded and decoded")
            processes.barrier()  # the parts stay until they are joined
        finally:
            own.unlink(missing_ok=True)


if __name__ == "__main__":
    run_command(main)
