"""Sample files: parts as they are made, over any number of processes, then one .npz and its description.

Finished parts are stored as they come, so an interrupted run goes on where it stopped.
"""

import json
import time
import zipfile
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cca.distributed import Processes, StopRequest
from cca.sampling.compiled import CompiledGenerate
from cca.sampling.fitting import memory_named
from cca.sampling.sampler import (
    SampleRequest,
    class_of,
    decode_tokens,
    eager_generate,
    prepare,
    sample_tokens,
)
from models import ARImageModel, UserError
from models.devices import device_name
from models.files import (
    atomic_write,
    parse_json,
    read_array,
    read_json,
    remove_folder,
    write_binary,
    write_json,
    writing,
)
from models.outputs import check_space, differing

PART_IMAGES = 256  # images per stored part
HEADER_BYTES = 128  # of a part's file: np.save pads to this
NOT_COMPARED = ("weights",)  # how the path was spelled; the hash of the weights counts
BEFORE = {"compile": False}  # what earlier versions did without noting it


class PartStore:
    """Finished ranges beside the output file, and the options they were made with.

    The folder's ``options.json`` marks it as an unfinished run: written before the first part, and
    gone, with the whole folder, after the output and its description are there.
    """

    def __init__(self, output: Path, options: dict, shape: tuple[int, ...]):
        """shape: of all images, [N, H, W, 3]."""
        self.folder, self.report = output.with_name(output.name + ".parts"), output.with_suffix(".json")
        self.output, self.options, self.shape = output, options, shape
        self.marker = self.folder / "options.json"

    def open(self) -> bool:
        """Claim the folder for these options (in one process); whether the output is finished already.

        Raises UserError, and leaves everything as it is, where the output or its parts are of a run with
        other options, would overwrite what sample.py did not write, or do not fit on the disk.
        """
        unfinished = self.marker.exists()
        if unfinished:
            self._refuse_others(
                read_json(self.marker), self.folder, "an unfinished run", "repeat its command"
            )
        elif self.folder.exists():
            foreign = [p.name for p in self.folder.iterdir() if p.suffix not in (".npy", ".tmp")]
            if foreign:
                raise UserError(f"--output: {self.folder} is in the way, it holds {foreign[0]}; move it")
        if self._finished(unfinished):
            remove_folder(self.folder)
            return True
        made = sum(len(part) for part in self.parts() if self.made(part)) if unfinished else 0
        needed = (2 * self.shape[0] - made) * int(np.prod(self.shape[1:]))
        check_space("--output", self.output, needed, "its parts, then the file")
        if not unfinished:
            remove_folder(self.folder)  # parts without a marker belong to nobody knows which options
            with writing(self.folder):
                self.folder.mkdir()
            write_json(self.marker, self.options)
        with writing(self.report):
            self.report.unlink(missing_ok=True)  # it describes an output that is gone
        return False

    def _finished(self, unfinished: bool) -> bool:
        """Whether output and description are there for these options; raises UserError for any others."""
        described = _read_report(self.report)
        if self.report.exists() and described is None:
            raise UserError(
                f"--output: {self.report}, where the samples are described, is a file that sample.py "
                "did not write; take another name"
            )
        if not self.output.exists():
            return False
        if described is None:
            if unfinished:  # earlier versions described it last
                return False
            raise UserError(
                f"--output: {self.output} exists, and {self.report.name} does not say how it was made; "
                "take another name, or remove it"
            )
        self._refuse_others(described, self.output, "samples", "take another name")
        try:
            with zipfile.ZipFile(self.output) as archive, archive.open("arr_0.npy") as file:
                np.lib.format.read_magic(file)
                found, _, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception:  # a damaged file can raise anything
            found, dtype = (), np.dtype(np.uint8)
        if found != self.shape or dtype != np.uint8:
            raise UserError(
                f"--output: {self.output} is not what {self.report.name} describes; remove it to sample anew"
            )
        return True

    def _refuse_others(self, before: dict, path: Path, what: str, remedy: str) -> None:
        changed = differing({**BEFORE, **before}, self.options, NOT_COMPARED)
        if changed:
            raise UserError(
                f"--output: {path} holds {what} with {changed[0]}; {remedy}, or remove {_kind(path)}"
            )

    def parts(self) -> Iterator[range]:
        for start in range(0, self.shape[0], PART_IMAGES):
            yield range(start, min(start + PART_IMAGES, self.shape[0]))

    def path(self, part: range) -> Path:
        return self.folder / f"{part.start:08d}.npy"

    def made(self, part: range) -> bool:
        """Whether a part is there, whole."""
        try:
            size = self.path(part).stat().st_size
        except OSError:
            return False
        return size == HEADER_BYTES + len(part) * int(np.prod(self.shape[1:]))

    def write(self, part: range, images: np.ndarray) -> None:
        write_binary(self.path(part), lambda file: np.save(file, images))

    def _read(self, part: range) -> np.ndarray:
        try:
            images = read_array(self.path(part))
        except UserError:
            images = np.empty(0)
        if images.shape != (len(part), *self.shape[1:]) or images.dtype != np.uint8:
            raise UserError(f"--output: {self.path(part)} is damaged; remove it, and repeat the command")
        return images

    def leave(self) -> None:
        """Remove the folder if no part is stored: what was asked for may have been impossible."""
        if not any(self.made(part) for part in self.parts()):
            remove_folder(self.folder)

    def assemble(self, labels: Iterator[np.ndarray], report: dict) -> None:
        """Join the parts into one .npz, one part in memory at a time; ``labels`` [n] of each part in order.

        The description comes before it, so that an output which is there has one; then the parts go.
        """

        def write(temporary: Path) -> None:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                # An entry without a date: the same samples are the same bytes.
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                    header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    for part in self.parts():
                        file.write(self._read(part).tobytes())
                with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as file:
                    header = {"descr": "<i8", "fortran_order": False, "shape": self.shape[:1]}
                    np.lib.format.write_array_header_1_0(file, header)
                    for some in labels:
                        file.write(some.astype("<i8").tobytes())

        write_json(self.report, report)
        atomic_write(self.output, write)
        remove_folder(self.folder)


def _kind(path: Path) -> str:
    return "that folder" if path.is_dir() else "it"


def _read_report(path: Path) -> dict | None:
    """The options in a description that sample.py wrote; None for anything else."""
    try:
        content = parse_json(path.read_text())
    except (OSError, ValueError):
        return None
    options = content.get("options") if isinstance(content, dict) else None
    return options if isinstance(options, dict) and "num_samples" in options else None


def run_sampling(
    model: ARImageModel,
    request: SampleRequest,
    batch_size: int,
    output: Path,
    provenance: dict,
    processes: Processes,
    compile: bool = False,
) -> bool:
    """Sample, store, assemble ``output`` (.npz) and write its ``.json`` beside it; one line if it is there.

    compile: decode with ``CompiledGenerate``, on a GPU with a compiled tokenizer too.

    Returns False where a signal stopped it: what is stored is taken by the same command. Leaves the
    model's matrices in ``request.dtype``. Raises UserError; see ``PartStore.open``.
    """
    options = {
        **{k: v for k, v in asdict(request).items() if k != "sampling"},
        **asdict(request.sampling),
        **provenance,
        "compile": compile,
    }
    options = json.loads(json.dumps(options))  # as it reads back: tuples become lists
    size = request.eval_size or model.image_size
    store = PartStore(output, options, (request.num_samples, size, size, 3))
    finished = False

    def open_store() -> None:
        nonlocal finished
        finished = store.open()

    with processes.holding(output), StopRequest() as stop:
        processes.agree(open_store, main=True)
        if processes.any(finished):
            if processes.main:
                print(f"{output} is finished already, with these options; nothing is left to do")
            return True
        try:
            return _fill(store, model, request, batch_size, processes, stop)
        finally:
            if processes.main:
                store.leave()


def _fill(
    store: PartStore,
    model: ARImageModel,
    request: SampleRequest,
    batch_size: int,
    processes: Processes,
    stop: StopRequest,
) -> bool:
    """Sample the missing parts of a claimed store, and assemble it; False if a signal came first."""
    started, compile = time.perf_counter(), store.options["compile"]
    if processes.main:
        where = f"{device_name(processes.device)} x {processes.world}"
        how = f"{request.dtype}, batch {batch_size}, {'compiled' if compile else 'eager'}"
        print(f"{store.options['model']} at {model.image_size} pixels, {where}, {how}", flush=True)
    prepare(model, request.dtype, processes.device, compile)
    missing = [part.start for part in store.parts() if not store.made(part)]
    processes.barrier()  # all have looked before one writes
    mine = [range(i, min(i + PART_IMAGES, request.num_samples)) for i in missing]
    mine = mine[processes.rank :: processes.world]
    indices, parts = chain.from_iterable(mine), deque(mine)
    generate = (
        CompiledGenerate(model, request.sampling, request.dtype, batch_size, processes.device)
        if compile
        else eager_generate(model, request)
    )
    tokens: list[Tensor] = []  # of the parts to come, from the first one's beginning
    made, began = 0, time.perf_counter()
    with tqdm(
        total=sum(map(len, mine)),
        desc=f"sampling {store.output.name}",
        unit="image",
        disable=not processes.main,
    ) as bar:

        def make_next() -> None:
            """One batch of tokens, and the parts that it completes."""
            nonlocal tokens, made
            batch = list(islice(indices, batch_size))
            if not batch:
                return
            first = not bar.n and time.perf_counter()
            if first and compile:
                bar.set_postfix_str("compiling")
            with memory_named(model, request, batch_size, processes.device):
                tokens.append(sample_tokens(model, batch, request, processes.device, generate))
            if stop.asked:
                return  # a part of a part is not kept
            if first and compile:
                bar.set_postfix_str(f"first batch {time.perf_counter() - first:.0f} s")
            bar.update(len(batch))
            while parts and sum(map(len, tokens)) >= len(parts[0]):
                part, drawn = parts.popleft(), torch.cat(tokens)
                store.write(part, decode_tokens(model, drawn[: len(part)], request).numpy())
                tokens = [drawn[len(part) :]]
                made += len(part)

        # Signals reach the processes at different moments, and one may have a part more than another.
        while processes.any(bool(parts)) and not processes.any(stop.asked):
            processes.agree(make_next)
        stopped = processes.any(stop.asked)
    seconds = time.perf_counter() - began
    totals = processes.sum(
        torch.tensor([float(made), seconds], dtype=torch.float64, device=processes.device)
    ).tolist()
    if stopped:
        if processes.main:
            stored = sum(len(part) for part in store.parts() if store.made(part))
            print(
                f"stopped; {stored} of {request.num_samples} images are stored, "
                "the same command goes on from there"
            )
        return False
    report = {
        "options": store.options,
        "batch_size": batch_size,
        "processes": processes.world,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "images_made_by_this_run": int(totals[0]),
        "images_per_second": totals[0] / (totals[1] / processes.world) if totals[0] else None,
        "wall_seconds": time.perf_counter() - started,
    }
    labels = (np.array([class_of(i, request) for i in part], np.int64) for part in store.parts())
    processes.agree(lambda: store.assemble(labels, report), main=True)
    return True
