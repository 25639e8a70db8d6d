"""Encode labelled images with a model's tokenizer, once, into packed codes for training.

    python -m scripts.extract_codes --model llamagen-mini \\
        --data assets/fashion-mnist-train-10k.npz --output runs/codes
    torchrun --nproc_per_node 8 -m scripts.extract_codes --model llamagen-b \\
        --data imagenet --output codes384_ten_crop
    torchrun --nproc_per_node 8 -m scripts.extract_codes --model llamagen-b \\
        --data imagenet --crop-range 1.05 --output codes384_ten_crop_105

Writes DIR/codes.npy uint16 [N, crops, L], DIR/labels.npy int64 [N] and DIR/header.json, which is
written last: a folder with a header is complete. Images of a folder give ten crops, as LlamaGen
was trained; images of an .npz are taken as they are. An interrupted run goes on where it stopped.
Training draws half of its crops from DIR_105 if that folder lies beside DIR.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from cca.data.sources import TokenSource, open_labelled_images
from cca.distributed import Processes
from models.errors import UserError, run_command
from models.files import write_binary, write_json
from models.image_transforms import TenCrops
from models.loading import load_files, locate
from models.options import Parser, count, number
from models.zoo import ZOO

CHUNK = 1024  # images between two notes of progress


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, choices=sorted(ZOO), help="whose tokenizer encodes")
    add("--tokenizer-weights", metavar="PATH|NAME", help="tokenizer weights (default: the model's own)")
    add(
        "--image-size",
        type=count(),
        metavar="PIXELS",
        help="LlamaGen: 256, 384 or 512 (default: the model's)",
    )
    add(
        "--data",
        required=True,
        type=Path,
        metavar="PATH",
        help="folder of class folders, or an .npz with arr_0 uint8 [N, H, W(, 3)] and arr_1 labels [N]",
    )
    add(
        "--crop-range",
        type=number(1, 2),
        default=1.1,
        help="centre crop over image size before the ten crops (default %(default)s)",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="folder for the codes")
    add(
        "--batch-size",
        type=count(),
        default=128,
        help="crops encoded at once in one process (default %(default)s)",
    )
    add(
        "--workers",
        type=count(0),
        default=0,
        help="image loading processes of each process (default 0: none)",
    )
    return parser


class CodeFile:
    """DIR/codes.npy while it is being filled, and which chunks of it are done."""

    def __init__(self, folder: Path, shape: tuple[int, ...], header: dict, processes: Processes):
        self.folder, self.header, self.processes = folder, header, processes
        self.notes, self.partial = folder / "progress", folder / "codes.partial.npy"
        begun = self.notes / "header.json"
        if begun.exists() and json.loads(begun.read_text()) != header:
            raise UserError(
                f"--output: {folder} holds an unfinished run with other options; "
                "repeat its command, or remove that folder"
            )
        processes.barrier()
        if processes.main and not begun.exists():
            self.notes.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(self.partial, "w+", np.uint16, shape).flush()
            write_json(begun, header)
        processes.barrier()
        self.codes = np.lib.format.open_memmap(self.partial, "r+")

    def open_chunks(self) -> list[range]:
        """This process's chunks that are not done."""
        size = len(self.codes)
        chunks = [range(i, min(i + CHUNK, size)) for i in range(0, size, CHUNK)]
        return [
            c
            for c in chunks[self.processes.rank :: self.processes.world]
            if not (self.notes / f"{c.start}").exists()
        ]

    def finish_chunk(self, chunk: range) -> None:
        self.codes.flush()
        (self.notes / f"{chunk.start}").touch()

    def finish(self, labels: np.ndarray) -> None:
        self.processes.barrier()
        if self.processes.main:
            write_binary(self.folder / "labels.npy", lambda file: np.save(file, labels))
            self.partial.rename(self.folder / "codes.npy")
            write_json(self.folder / "header.json", self.header)
            for note in self.notes.iterdir():
                note.unlink()
            self.notes.rmdir()
        self.processes.barrier()


def encode(source: TokenSource, chunk: range, file: CodeFile, batch_size: int, workers: int) -> None:
    """Fill one chunk of the file."""
    crops = file.codes.shape[1]
    loader = DataLoader(
        source,
        batch_sampler=[[(0, i)] for i in chunk],
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    waiting: list[torch.Tensor] = []
    done = chunk.start
    for index, (images, unreadable) in zip(chunk, loader):
        if int(unreadable) >= 0:
            tqdm.write(
                f"unreadable, replaced by another image of its class: {source.name(index)}", file=sys.stderr
            )
        waiting.append(images.view(crops, *images.shape[-3:]))
        if len(waiting) * crops >= batch_size or index == chunk[-1]:
            tokens = torch.cat([source.tokens(part) for part in torch.cat(waiting).split(batch_size)])
            file.codes[done : done + len(waiting)] = tokens.view(len(waiting), crops, -1).cpu().numpy()
            done, waiting = done + len(waiting), []
    file.finish_chunk(chunk)


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if (args.output / "header.json").exists():
        raise UserError(
            f"--output: {args.output} holds finished codes already; remove that folder, or take another"
        )
    processes = Processes()
    files = locate(args.model, None, tokenizer_weights=args.tokenizer_weights, image_size=args.image_size)
    model = load_files(files)
    transform = TenCrops(model.image_size, args.crop_range)
    source = open_labelled_images(args.data, model, transform=transform)
    model.tokenizer.to(processes.device)
    header = {
        "model": args.model,
        "image_size": model.image_size,
        "vocab_size": model.vocab_size,
        "tokenizer_sha256": files.describe()["tokenizer_sha256"],
        "images": len(source),
        "crops": source.crops,
        "crop_range": args.crop_range if source.crops > 1 else None,
    }
    file = CodeFile(args.output, (len(source), header["crops"], model.sequence_length), header, processes)
    chunks = file.open_chunks()
    with tqdm(total=sum(map(len, chunks)), desc="encoding", unit="image", disable=not processes.main) as bar:
        for chunk in chunks:
            encode(source, chunk, file, args.batch_size, args.workers)
            bar.update(len(chunk))
    file.finish(source.labels(np.arange(len(source))).numpy())


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_command(main)
