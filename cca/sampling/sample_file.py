"""Sample files: parts as they are made, over any number of processes, then one .npz and its description.

Finished parts are stored as they come, so an interrupted run goes on where it stopped.
"""

import json
import shutil
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cca.distributed import Processes
from cca.sampling.sampler import GraphedGenerate, SampleRequest, class_of, sample_images
from models import DTYPES, ARImageModel, UserError
from models.files import atomic_write, write_binary, write_json

PART_IMAGES = 256  # images per stored part


class PartStore:
    """Finished ranges beside the output file, and the options they were made with."""

    def __init__(self, output: Path, options: dict, processes: Processes):
        self.folder, self.output, self.options = output.with_name(output.name + ".parts"), output, options
        self.marker = self.folder / "options.json"
        if self.marker.exists():
            before = json.loads(self.marker.read_text())
            changed = [k for k in {**before, **options} if before.get(k) != options.get(k)]
            if changed:
                name = changed[0]
                raise UserError(
                    f"--output: {self.folder} holds an unfinished run with {name} {before.get(name)} "
                    f"instead of {options.get(name)}; repeat its command, or remove that folder"
                )
        processes.barrier()
        if processes.main and not self.marker.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.marker, options)
        processes.barrier()

    def path(self, part: range) -> Path:
        return self.folder / f"{part.start:08d}.npy"

    def write(self, part: range, images: np.ndarray) -> None:
        write_binary(self.path(part), lambda file: np.save(file, images))

    def assemble(self, parts: list[range], labels: np.ndarray, shape: tuple[int, ...]) -> None:
        """Join the parts into one .npz, one part in memory at a time."""

        def write(temporary: Path) -> None:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    for part in parts:
                        file.write(np.load(self.path(part)))
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, labels)

        atomic_write(self.output, write)

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def check_space(output: Path, needed: int) -> None:
    """Raise UserError if parts and assembled file will not fit."""
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise UserError(
            f"--output: {output.parent} has {free / 1e9:.1f} GB free, "
            f"the run needs {needed / 1e9:.1f} GB (its parts, then the file)"
        )


def run_sampling(
    model: ARImageModel,
    request: SampleRequest,
    batch_size: int,
    output: Path,
    provenance: dict,
    processes: Processes,
    cuda_graphs: bool = False,
) -> None:
    """Sample, store, assemble ``output`` (.npz) and write its ``.json`` beside it.

    Leaves the model's matrices in ``request.dtype``.
    """
    started = time.perf_counter()
    model.transformer.store_matrices(DTYPES[request.dtype])
    model = model.to(processes.device)
    options = {
        **{k: v for k, v in asdict(request).items() if k != "sampling"},
        **asdict(request.sampling),
        **provenance,
    }
    options = json.loads(json.dumps(options))  # as it reads back: tuples become lists
    store = PartStore(output, options, processes)
    parts = [
        range(i, min(i + PART_IMAGES, request.num_samples))
        for i in range(0, request.num_samples, PART_IMAGES)
    ]
    size = request.eval_size or model.image_size
    open_images = sum(len(part) for part in parts if not store.path(part).exists())
    check_space(output, (open_images + request.num_samples) * size * size * 3)
    processes.barrier()  # all have looked before one writes
    mine = [part for part in parts[processes.rank :: processes.world] if not store.path(part).exists()]
    made = sum(map(len, mine))
    generate = (
        GraphedGenerate(model, request, min(batch_size, PART_IMAGES), processes.device)
        if cuda_graphs and made
        else None
    )
    began = time.perf_counter()
    with tqdm(total=made, desc=f"sampling {output.name}", unit="image", disable=not processes.main) as bar:
        for part in mine:
            store.write(
                part,
                sample_images(
                    model, part, request, batch_size, processes.device, generate, bar.update
                ).numpy(),
            )
    seconds = time.perf_counter() - began
    totals = processes.sum(
        torch.tensor([float(made), seconds], dtype=torch.float64, device=processes.device)
    ).tolist()
    if processes.main:
        labels = np.array([class_of(i, request) for i in range(request.num_samples)], np.int64)
        store.assemble(parts, labels, (request.num_samples, size, size, 3))
        report = {
            "options": options,
            "batch_size": batch_size,
            "processes": processes.world,
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
            "images_made_by_this_run": int(totals[0]),
            "images_per_second": totals[0] / (totals[1] / processes.world) if made else None,
            "wall_seconds": time.perf_counter() - started,
        }
        write_json(output.with_suffix(".json"), report)
        store.remove()
    processes.barrier()
