"""The sampler of both backbones: images by index, in ranges, over any number of processes.

Image i is a function of (seed, i, its class, the model, the options) alone. Finished ranges are
stored as they come, so an interrupted run goes on where it stopped.
"""

import json
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from cca.distributed import Processes
from cca.errors import UserError
from cca.random import CLASSES, TOKENS, stream
from models.base import ARImageModel, SamplingOptions
from models.checkpoints import atomic_write, write_binary, write_json

RANGE = 256  # images per stored part
# Pixels of one batch of the tokenizer's decoder: 32 images of 256 x 256, and 4 on a CPU, which more do not make faster.
DECODED_PIXELS = {"cuda": 2**21, "cpu": 2**18}


@dataclass(frozen=True)
class SampleRequest:
    """What is to be sampled; ``classes`` lists the classes in use, ``eval_size`` resizes (bicubic)."""

    num_samples: int
    classes: tuple[int, ...]
    class_order: str
    seed: int
    eval_size: int | None
    dtype: str
    sampling: SamplingOptions


def class_of(index: int, request: SampleRequest) -> int:
    """Class of image ``index``: in turn (balanced and interleaved), or drawn uniformly."""
    if request.class_order == "balanced":
        return request.classes[index % len(request.classes)]
    return request.classes[int(stream(request.seed, CLASSES, index).integers(len(request.classes)))]


def token_noise(index: int, length: int, seed: int) -> np.ndarray:
    """The uniform numbers [length] that decide the tokens of image ``index``."""
    return stream(seed, TOKENS, index).random(length)


def compile_blocks(model: ARImageModel) -> None:
    """torch.compile the transformer blocks, once for all lengths of the cache."""
    for block in model.transformer.stack:
        block.compile(dynamic=True)


Generate = Callable[[Tensor, Tensor], Tensor]  # labels [n], uniforms [n, L] -> tokens [n, L]


def eager_generate(model: ARImageModel, request: SampleRequest) -> Generate:
    def generate(labels: Tensor, uniforms: Tensor) -> Tensor:
        with precision(labels.device, request.dtype):
            return model.generate(labels, uniforms, request.sampling)

    return generate


class GraphedGenerate:
    """All decoding steps of one batch as a single CUDA graph; a smaller batch is filled up.

    At these batch sizes launching the kernels takes longer than running them; a graph launches once.
    """

    def __init__(self, model: ARImageModel, request: SampleRequest, batch_size: int, device: torch.device):
        generate = eager_generate(model, request)
        self.labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(batch_size, model.sequence_length, dtype=torch.float64, device=device)
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            warm_up
        ):  # libraries set themselves up, and blocks compile, before the capture
            generate(self.labels, self.uniforms)
        torch.cuda.current_stream().wait_stream(warm_up)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.tokens = generate(self.labels, self.uniforms)

    def __call__(self, labels: Tensor, uniforms: Tensor) -> Tensor:
        rows = len(labels)
        self.labels[:rows].copy_(labels)
        self.uniforms[:rows].copy_(uniforms)
        self.graph.replay()
        return self.tokens[:rows].clone()


def sample_tokens(
    model: ARImageModel, indices: range, request: SampleRequest, device: torch.device, generate: Generate
) -> Tensor:
    """Tokens [n, L] of these indices, as one batch."""
    labels = torch.tensor([class_of(i, request) for i in indices], device=device)
    noise = np.stack([token_noise(i, model.sequence_length, request.seed) for i in indices])
    return generate(labels, torch.from_numpy(noise).to(device))


@torch.inference_mode()
def decode_tokens(model: ARImageModel, tokens: Tensor, request: SampleRequest) -> Tensor:
    """Tokens [n, L] -> uint8 images [n, H, W, 3] on the CPU.

    Decoding runs in batches of one fixed size, the last one filled up: convolutions round
    differently from one batch size to another, and a pixel must not.
    """
    size = max(1, min(64, DECODED_PIXELS[tokens.device.type] // model.image_size**2))
    images = []
    for part in tokens.split(size):
        full = torch.cat([part, part[:1].expand(size - len(part), -1)])
        with precision(tokens.device, request.dtype if model.decodes_in_half_precision else "float32"):
            decoded = model.decode(full, request.eval_size)
        images.append(model.to_uint8(decoded[: len(part)]).permute(0, 2, 3, 1).cpu())
    return torch.cat(images)


def precision(device: torch.device, dtype: str) -> torch.autocast:
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def sample_images(
    model: ARImageModel,
    indices: range,
    request: SampleRequest,
    batch_size: int,
    device: torch.device,
    generate: Generate | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> Tensor:
    """uint8 images [n, H, W, 3] of these indices; ``progress`` hears of each finished batch."""
    generate, tokens = generate or eager_generate(model, request), []
    for start in range(indices.start, indices.stop, batch_size):
        batch = range(start, min(start + batch_size, indices.stop))
        tokens.append(sample_tokens(model, batch, request, device, generate))
        progress(len(batch))
    return decode_tokens(model, torch.cat(tokens), request)


def first_images(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images and classes of a sample file, without reading the rest of it."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        count = min(count, shape[0])
        images = np.frombuffer(file.read(count * int(np.prod(shape[1:]))), dtype).reshape(count, *shape[1:])
    with np.load(path) as file:
        return images, file["arr_1"][:count]


def write_grid(images: np.ndarray, path: Path, columns: int, captions: list[str] | None = None) -> None:
    """PNG of uint8 images [n, H, W, 3] in rows of ``columns``, with a caption under each if given."""
    height, width = images.shape[1:3]
    scale = max(1, 96 // width)  # small images are shown larger, pixel for pixel
    cell, strip = (width * scale, height * scale), 14 if captions else 0
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (cell[0] + 2), rows * (cell[1] + strip + 2)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, image in enumerate(images):
        left, top = i % columns * (cell[0] + 2), i // columns * (cell[1] + strip + 2)
        sheet.paste(Image.fromarray(image).resize(cell, Image.Resampling.NEAREST), (left, top))
        if captions:
            name = captions[i]
            while font.getlength(name) > cell[0] and len(name) > 1:
                name = name[:-2] + "…"
            draw.text((left + 1, top + cell[1]), name, "black", font)
    atomic_write(path, lambda temporary: sheet.save(temporary, format="PNG"))


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
                    f"--output: {self.folder} holds an unfinished run with {name} {before.get(name)} instead of "
                    f"{options.get(name)}; repeat its command, or remove that folder"
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
            f"--output: {output.parent} has {free / 1e9:.1f} GB free, the run needs {needed / 1e9:.1f} GB (its parts, then the file)"
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
    """Sample, store, assemble ``output`` (.npz) and write its ``.json`` beside it. Leaves the model's matrices in ``request.dtype``."""
    started = time.perf_counter()
    model.transformer.store_matrices(getattr(torch, request.dtype))
    model = model.to(processes.device)
    options = {
        **{k: v for k, v in asdict(request).items() if k != "sampling"},
        **asdict(request.sampling),
        **provenance,
    }
    options = json.loads(json.dumps(options))  # as it reads back: tuples become lists
    store = PartStore(output, options, processes)
    parts = [range(i, min(i + RANGE, request.num_samples)) for i in range(0, request.num_samples, RANGE)]
    size = request.eval_size or model.image_size
    open_images = sum(len(part) for part in parts if not store.path(part).exists())
    check_space(output, (open_images + request.num_samples) * size * size * 3)
    processes.barrier()  # all have looked before one writes
    mine = [part for part in parts[processes.rank :: processes.world] if not store.path(part).exists()]
    made = sum(map(len, mine))
    generate = (
        GraphedGenerate(model, request, min(batch_size, RANGE), processes.device)
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
