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
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from cca.data.classes import add_classes_option, read_classes
from cca.data.sources import TokenSource, open_labelled_images
from cca.distributed import Processes, Stopped, StopRequest, children_ignore_signals
from models.devices import DOES_NOT_FIT, memory_named
from models.errors import UserError, run_command
from models.files import read_array, read_json, remove_folder, write_binary, write_json, writing
from models.image_transforms import TenCrops
from models.loading import find_files
from models.options import Parser, add_workers_option, count, number
from models.outputs import check_output, check_space, differing
from models.plan import add_dry_run_option, show_plan, size_text
from models.weights import tensors_sha256
from models.zoo import ZOO

CHUNK = 1024  # images between two notes of progress


def make_parser() -> Parser:
    parser = Parser(__doc__, "scripts.extract_codes")
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
    add_classes_option(parser)
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
        help="crops read before they are encoded, in parts that fit a GPU (default %(default)s)",
    )
    add_workers_option(parser)
    add_dry_run_option(parser)
    return parser


def progress(folder: Path) -> Path:
    """Where a run that is not finished keeps its notes."""
    return folder / "progress"


def look(folder: Path, header: dict) -> str | None:
    """What the folder holds of these codes, "finished" or "begun"; writes nothing.

    Raises UserError where it holds codes of other options.
    """
    found = None
    markers = (("begun", progress(folder), "an unfinished run"), ("finished", folder, "finished codes"))
    for state, place, what in markers:
        marker = place / "header.json"
        if not marker.exists():
            continue
        if changed := differing(read_json(marker), header):
            raise UserError(
                f"--output: {folder} holds {what} with {changed[0]}; "
                "repeat its command, remove that folder, or take another"
            )
        found = state
    return found


def chunks_to_do(folder: Path, images: int) -> list[int]:
    """First images of the chunks that are not done."""
    return [i for i in range(0, images, CHUNK) if not (progress(folder) / f"{i}").exists()]


class CodeFile:
    """DIR/codes.npy while it is being filled, and which chunks of it are done.

    DIR/progress/ holds the options and a note of each finished chunk. The header, with which the codes
    are complete, is written last; then the notes go.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], header: dict, processes: Processes):
        """Raises UserError where the folder holds codes of other options, or the codes do not fit."""
        self.folder, self.shape, self.header, self.processes = folder, shape, header, processes
        self.notes, self.partial, self.whole = (
            progress(folder),
            folder / "codes.partial.npy",
            folder / "codes.npy",
        )
        self.finished = False
        processes.agree(self._begin, main=True)
        self.finished = processes.any(self.finished)
        if not self.finished:
            self.filled = self._filled()
            self.begins = read_array(self.filled, "r").offset

    def _filled(self) -> Path:
        """The file that is being filled; it gets its name before the header is written."""
        return self.partial if self.partial.exists() else self.whole

    def _begin(self) -> None:
        found = look(self.folder, self.header)
        if found == "finished":
            remove_folder(self.notes)
            self.finished = True
        elif found is None:
            self._reserve()
            with writing(self.notes):
                self.notes.mkdir(exist_ok=True)
            write_json(self.notes / "header.json", self.header)
        else:
            self._check()

    def _reserve(self) -> None:
        """Make the file with all its space: a hole in it would end the process where the disk is full."""
        in_the_way = next((f for f in (self.whole, self.folder / "labels.npy") if f.exists()), None)
        if in_the_way:
            raise UserError(
                f"--output: {in_the_way} is there without a header.json; remove it, or take another folder"
            )
        size = int(np.prod(self.shape)) * 2
        check_space("--output", self.partial, size, "its codes")
        try:
            with writing(self.partial), open(self.partial, "wb") as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "<u2", "fortran_order": False, "shape": self.shape}
                )
                file.flush()
                os.posix_fallocate(file.fileno(), 0, file.tell() + size)
        except UserError:
            self.partial.unlink(missing_ok=True)
            raise

    def _check(self) -> None:
        """What was begun must be there as it was reserved."""
        try:
            found = read_array(self._filled(), "r")
        except UserError as error:
            raise UserError(f"--output: {error}; remove {self.folder}") from None
        if found.shape != self.shape or found.dtype != np.uint16:
            raise UserError(
                f"--output: {self._filled()} holds {list(found.shape)} codes instead of {list(self.shape)}; "
                f"remove {self.folder}"
            )

    def open_chunks(self) -> list[range]:
        """This process's chunks that are not done; one process looks, before any writes."""
        size = self.shape[0]
        starts = chunks_to_do(self.folder, size)
        missing = json.loads(self.processes.from_main(json.dumps(starts)))
        own = missing[self.processes.rank :: self.processes.world]
        return [range(i, min(i + CHUNK, size)) for i in own]

    def write(self, start: int, codes: np.ndarray) -> None:
        """Codes [n, crops, L] of the images from ``start`` on."""
        row = 2 * int(np.prod(self.shape[1:]))
        with writing(self.filled):
            # No mapping, and nothing cached: NFS would write whole pages back, over what another node wrote.
            handle = os.open(self.filled, os.O_WRONLY | os.O_DSYNC)
            with os.fdopen(handle, "wb") as file:
                file.seek(self.begins + start * row)
                file.write(codes.astype("<u2").tobytes())

    def finish_chunk(self, chunk: range) -> None:
        with writing(self.notes):
            (self.notes / f"{chunk.start}").touch()

    def finish(self, labels: np.ndarray) -> None:
        self.processes.agree(partial(self._finish, labels), main=True)

    def _finish(self, labels: np.ndarray) -> None:
        write_binary(self.folder / "labels.npy", lambda file: np.save(file, labels))
        with writing(self.whole):
            if self.partial.exists():
                os.replace(self.partial, self.whole)
        write_json(self.folder / "header.json", self.header)
        remove_folder(self.notes)


def encode(
    source: TokenSource,
    chunk: range,
    file: CodeFile,
    batch_size: int,
    workers: int,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Fill one chunk of the file; ``check`` is called after each batch, and may raise."""
    crops = file.shape[1]
    loader = DataLoader(
        source,
        batch_sampler=[[(0, i)] for i in chunk],
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    waiting: list[torch.Tensor] = []
    done = chunk.start
    with children_ignore_signals():
        items = iter(loader)
    for index, (images, unreadable) in zip(chunk, items):
        if int(unreadable) >= 0:
            tqdm.write(
                f"unreadable, replaced by another image of its class: {source.name(index)}", file=sys.stderr
            )
        waiting.append(images.view(crops, *images.shape[-3:]))
        if len(waiting) * crops >= batch_size or index == chunk[-1]:
            tokens = torch.cat([source.tokens(part) for part in torch.cat(waiting).split(batch_size)])
            file.write(done, tokens.view(len(waiting), crops, -1).cpu().numpy())
            done, waiting = done + len(waiting), []
            check()
    file.finish_chunk(chunk)


def fill(
    source: TokenSource, file: CodeFile, batch_size: int, workers: int, stop: StopRequest, too_large: str
) -> bool:
    """Encode all chunks that are not done and finish the file; False if a signal came first.

    too_large: what to say where a GPU's memory runs out.
    """
    processes, chunks = file.processes, file.open_chunks()
    with tqdm(total=sum(map(len, chunks)), desc="encoding", unit="image", disable=not processes.main) as bar:

        def encode_next() -> None:
            if not chunks:
                return
            chunk = chunks.pop(0)
            with suppress(Stopped), memory_named(too_large):  # a part of a chunk is not noted
                encode(source, chunk, file, batch_size, workers, stop.check)
                bar.update(len(chunk))

        # Signals reach the processes at different moments, and one may have a chunk more than another.
        while processes.any(bool(chunks)) and not processes.any(stop.asked):
            processes.agree(encode_next)
        stopped = processes.any(stop.asked)
    if stopped:
        if processes.main:
            notes = sum(note.name.isdigit() for note in file.notes.iterdir())
            print(f"stopped; {notes} chunks of {CHUNK} images are done, the same command goes on from there")
        return False
    file.finish(source.labels(np.arange(len(source))).numpy())
    return True


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    check_output("--output", args.output, {"--data": args.data}, folder=True)
    processes = Processes()
    files = find_files(args.model, None, args.tokenizer_weights, args.image_size)
    model = files.build()
    transform = TenCrops(model.image_size, args.crop_range)
    classes = read_classes(args.classes_from)
    source = open_labelled_images(args.data, model, transform=transform, classes=classes)
    shape, downloads = (len(source), source.crops, model.sequence_length), files.downloads(model)
    made_from = {
        "model": args.model,
        "image_size": model.image_size,
        "vocab_size": model.vocab_size,
        "images": len(source),
        "crops": source.crops,
        "crop_range": args.crop_range if source.crops > 1 else None,
        "classes": source.classes,
    }

    def show() -> None:
        tokenizer = files.known().get("tokenizer_sha256")
        state = look(args.output, made_from | ({"tokenizer_sha256": tokenizer} if tokenizer else {}))
        size = 2 * math.prod(shape)
        if not state:
            check_space("--output", args.output / "codes.npy", size, "its codes")
        crops = f", {source.crops} crops of each" if source.crops > 1 else ""
        rows = {
            "data": f"{args.data}, {len(source):,} images{crops}",
            "device": processes.devices,
            "writes": f"{args.output}/ (codes.npy ~{size_text(size)}, labels.npy, header.json)",
        }
        if state == "finished":
            rows["finished"] = f"{args.output} holds codes of these options already"
        elif state:
            to_do = sum(min(CHUNK, len(source) - start) for start in chunks_to_do(args.output, len(source)))
            rows["resumes"] = f"with the {len(source) - to_do:,} of {len(source):,} images that are encoded"
        show_plan(files.plan(model, None) | rows, downloads)

    if not processes.planned(show, downloads, args.dry_run):
        return
    files = files.fill(model)
    tokenizer = tensors_sha256(model.tokenizer)
    too_large = f"--model: the tokenizer of {args.model} {DOES_NOT_FIT}"
    with memory_named(too_large):
        model.tokenizer.to(processes.device)
    header = {
        **made_from,
        "tokenizer_sha256": files.describe()["tokenizer_sha256"],
        "tokenizer_tensors_sha256": tokenizer,
        "data_sha256": processes.digest(source.fingerprint),
    }
    with processes.holding(args.output, header, folder=True), StopRequest() as stop:
        file = CodeFile(args.output, shape, header, processes)
        if processes.main:
            for note in source.notes():
                print(f"note: {note}", file=sys.stderr)
        if not file.finished:
            fill(source, file, args.batch_size, args.workers, stop, too_large)
        elif processes.main:
            print(f"{args.output} holds these codes already; nothing is left to do")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_command(main)
