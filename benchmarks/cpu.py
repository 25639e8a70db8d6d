"""Sampling, a training step, evaluation and loading on this machine's CPU.

    python -m benchmarks.cpu                  # all rows, into results/cpu.md
    python -m benchmarks.cpu --small          # the bundled mini models, one minute
    python -m benchmarks.cpu --list
    python -m benchmarks.cpu --only sample-var-d16 --only train-var-d16 --rounds 5

Weights, files and images are random. Every row runs in a process of its own.

sample: the tokens of a batch, without and with guidance, compared with a plain, eager implementation of the
published procedure. There LlamaGen attends to a masked cache of full length. VAR computes each block's
adaptive LayerNorm vectors at every level, and runs the unconditional half of the batch even without guidance.
The two implementations alternate with the same weights and random numbers, and their tokens are compared.

train: an optimizer step of CCA with chunked likelihoods, as in the trainer, and with plain ones: all logits
at once, log_softmax, gather.

evaluate: ``eval_fid.py`` on .npz files, with the bundled features.

read: images of a folder, cropped to 256 pixels, and the same images in archives. index: opening many empty
files of 1,000 classes as ``--data``; an archive is opened first without, then with its cached index.

load: ``load_model`` of weights files as published, in half precision, and as .safetensors; each weight is
read once.
"""

import contextlib
import gc
import io
import json
import multiprocessing
import os
import shutil
import statistics
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import eval_fid
from benchmarks.table import Report, make_parser, select
from benchmarks.workloads import random_batch, random_model, recipe_config, timed
from cca.cli.main import run_command
from cca.cli.parser import count
from cca.data.datasets import open_labelled_images
from cca.data.image_sets import open_image_set
from cca.distributed import Ranks
from cca.training.trainer import Trainer
from models import DTYPES, ARImageModel, ARTransformer, SamplingOptions, autocast, load_model
from models.kv_cache import LayerCache
from models.llamagen import Attention, LlamaGen, rotate
from models.sampling import filter_logits, sample_tokens
from models.var import VAR
from models.zoo.checkpoint_formats import save_published, save_safetensors
from models.zoo.loading import build_model

OUTPUT = Path("results/cpu.md")
CPU = torch.device("cpu")
Lines = list[list[str]]  # a benchmark row has several lines of cells


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the function's result from a new process, with memory and patches of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.cpu"])  # the slow import runs once
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def time_and_memory(run: Callable[[], object]) -> tuple[float, int]:
    """Return (seconds of one call, peak resident memory above that before the call, in bytes)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM, to the present value
    before = memory("VmRSS")
    return timed(run), memory("VmHWM") - before


@torch.inference_mode()
def plain_var(model: ARImageModel, labels: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
    net, steps = model.transformer, len(model.step_sizes)
    doubled = torch.cat([labels, torch.full_like(labels, model.null_class)])
    previous, tokens = model.begin(doubled), labels.new_empty(len(labels), 0)
    for step, size in enumerate(model.step_sizes):
        state, start = net.condition(doubled, precompute=False), tokens.shape[1]
        state.cache, state.reconstruction = previous.cache, previous.reconstruction
        cond, uncond = model.next_logits(state, step, tokens.repeat(2, 1)).chunk(2)
        previous, strength = state, options.scale_at(step, steps) - 1
        logits = filter_logits((1 + strength) * cond - strength * uncond, options)
        tokens = torch.cat([tokens, sample_tokens(logits, uniforms[:, start : start + size])], dim=1)
    return tokens


def full_length_attention(self: Attention, x: Tensor, table: Tensor, cache: LayerCache) -> Tensor:
    """Attention over the whole preallocated cache, masked after the current position."""
    q, k, v = self.wqkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = rotate(q, table), rotate(k, table)
    for stored, new in ((cache.keys, k), (cache.values, v)):
        if cache.filled == 0:
            stored.zero_()  # a mask would not hide NaN
        stored[:, :, cache.filled : cache.filled + 1] = new
    mask = (torch.arange(cache.keys.shape[2]) <= cache.filled)[None, None, None]
    out = F.scaled_dot_product_attention(q, cache.keys, cache.values, attn_mask=mask)
    return self.wo(out.transpose(1, 2).flatten(2))


def plain_llamagen(model: ARImageModel, labels: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
    with mock.patch.object(Attention, "forward", full_length_attention):
        return model.generate(labels, uniforms, options)


PLAIN = {VAR: plain_var, LlamaGen: plain_llamagen}


def sample(name: str, image_size: int | None, images: int, dtype: str, rounds: int) -> Lines:
    model = random_model(name, CPU, image_size)
    model.transformer.store_matrices(DTYPES[dtype])
    labels = torch.arange(images) % model.num_classes
    uniforms = torch.rand(images, model.sequence_length, dtype=torch.float64)
    cells, ways = [str(images)], (PLAIN[type(model)], type(model).generate)
    for scale in (1.0, 2.0):
        options = SamplingOptions(scale, model.default_cfg_schedule)
        seconds, tokens = {way: [] for way in ways}, {}
        for way in ways * rounds:
            began = time.perf_counter()
            with autocast(CPU, dtype):
                tokens[way] = way(model, labels, uniforms, options)
            seconds[way].append(time.perf_counter() - began)
        plain, ours = (images / statistics.median(seconds[way]) for way in ways)
        differ = (tokens[ways[0]] != tokens[ways[1]]).float().mean().item()
        cells += [f"{plain:.4g}", f"{ours:.4g}", f"{ours / plain:.2f}", f"{differ:.2%}"]
    few = tokens[ways[1]][:8]
    with torch.inference_mode():
        return [[*cells, f"{timed(lambda: model.decode(few)) / len(few):.3g}"]]


def plain_forward(self: ARTransformer, labels: Tensor, inputs: Tensor, tokens: Tensor) -> Tensor:
    """Log-likelihoods as in the published code: all logits at once, in float32."""
    logprobs = self.logits(labels, inputs).log_softmax(-1)
    return logprobs.gather(-1, tokens[..., None])[..., 0].sum(1)


def measure_steps(plain: bool, name: str, image_size: int | None, images: int, rounds: int) -> list[float]:
    """Return the median seconds and median peak memory (MB) of an optimizer step; runs in a child process."""
    if plain:
        ARTransformer.forward = plain_forward
    model = random_model(name, CPU, image_size)
    trainer = Trainer(model, recipe_config(name, images, "float32"), images, Ranks())
    batch = random_batch(model, torch.zeros(images, dtype=torch.bool))
    trainer.optimizer_step(0, batch)  # allocates the moments of the optimizer
    seconds, peaks = zip(*(time_and_memory(lambda: trainer.optimizer_step(1, batch)) for _ in range(rounds)))
    return [statistics.median(seconds), statistics.median(peaks) / 1e6]


def train(*arguments: Any) -> Lines:
    seconds, peaks = zip(*(in_child(measure_steps, plain, *arguments) for plain in (True, False)))
    values = (*seconds, seconds[1] / seconds[0], *peaks, peaks[1] / peaks[0])
    return [[f"{value:.3g}" for value in values]]


def evaluate(images: int, reference_images: int, size: int, rounds: int) -> Lines:
    """Return the seconds of each part of an evaluation of random images."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.environ["XDG_CACHE_HOME"] = folder  # the user's cache may hold these features
        for name, number in (("samples", images), ("reference", reference_images)):
            np.savez(f"{folder}/{name}.npz", generator.integers(0, 256, (number, size, size, 3), np.uint8))
        eval_fid.main([
            "--samples", f"{folder}/samples.npz", "--reference", f"{folder}/reference.npz",
            "--features", "mini", "--metrics", "fid,is,precision,recall", "--output", f"{folder}/result.json",
        ])  # fmt: skip
        seconds = json.loads(Path(folder, "result.json").read_text())["seconds"]
    return [[part, f"{value:.2f}"] for part, value in seconds.items()]


LAYOUTS = ("images", "stored.zip", "deflated.zip", "plain.tar", "nested.tar")


def pack(folder: Path, name: str) -> Path:
    """Write an archive of a folder beside it and return its path; "nested.tar" has a tar per class folder."""
    path = folder.with_name(name)
    if path.suffix == ".zip":
        method = zipfile.ZIP_STORED if name == "stored.zip" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", method) as archive:
            for file in folder.rglob("*.*"):
                archive.write(file, file.relative_to(folder))
        return path
    with tarfile.open(path, "w") as tar:
        for inner in folder.iterdir():
            if name == "nested.tar":
                tar.add(shutil.make_archive(str(folder.with_name("part")), "tar", inner), f"{inner.name}.tar")
            else:
                tar.add(inner, inner.name)
    return path


def read(images: int, workers: int, rounds: int) -> Lines:
    """Return the images/s of each layout, for JPEGs of smoothed noise of 500 x 375 pixels, as in ImageNet."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = place
        folder = Path(place, "images")
        for index in range(images):
            path = folder / str(index % 10) / f"{index:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = Image.fromarray(generator.integers(0, 256, (47, 63, 3), np.uint8))
            noise.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=95)
        layouts = [folder, *(pack(folder, name) for name in LAYOUTS[1:])]
        rates: dict[str, list[float]] = {path.name: [] for path in layouts}
        for path in layouts * (rounds + 1):
            batches = open_image_set(path, 256, workers).batches(slice(0, images), 50)
            rates[path.name].append(images / timed(partial(list, batches)))
        medians = {
            name: statistics.median(values[1:]) for name, values in rates.items()
        }  # without the warm-up
        return [[name, f"{rate:.0f}", f"{rate / medians['images']:.2f}"] for name, rate in medians.items()]


def open_files(path: Path) -> list[float]:
    """Return seconds of opening ``--data``, MB that it holds, and MB at the peak; runs in a child process."""
    model, before, datasets = build_model("llamagen-b"), memory("VmRSS"), list[Any]()
    seconds, peak = time_and_memory(lambda: datasets.append(open_labelled_images(path, model)))
    gc.collect()
    return [seconds, (memory("VmRSS") - before) / 1e6, peak / 1e6]


def index(images: int, rounds: int) -> Lines:
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = place
        folder, lines = Path(place, "images"), list[list[str]]()
        for i in range(images):
            if i < 1000:
                (folder / str(i)).mkdir(parents=True)
            (folder / str(i % 1000) / f"n{i % 1000:08d}_{i}.JPEG").touch()
        for name in LAYOUTS:
            path = folder if name == "images" else pack(folder, name)
            for state in ("",) if name == "images" else ("index built", "index cached"):
                numbers = in_child(open_files, path)
                lines.append([f"{name}, {state}".strip(", "), *(f"{number:,.0f}" for number in numbers)])
        return lines


FORMATS = {
    "pt": (save_published, torch.float32),
    "pt, half precision": (save_published, torch.float16),
    "safetensors": (save_safetensors, torch.float32),
}


def read_weights(name: str, files: tuple[str, str]) -> None:
    for parameter in load_model(name, *files).parameters():
        parameter.detach().sum()


def load(name: str, rounds: int) -> Lines:
    lines = []
    for form, (save, dtype) in FORMATS.items():
        model = random_model(name, CPU).to(dtype)
        size = sum(4 * parameter.numel() for parameter in model.parameters())
        with tempfile.TemporaryDirectory() as folder:
            files = f"{folder}/model", f"{folder}/tokenizer"
            save(model.transformer.state_dict(), Path(files[0]))
            save(model.tokenizer.state_dict(), Path(files[1]))
            del model
            _, peak = time_and_memory(partial(read_weights, name, files))
        lines.append([form, f"{size / 1e9:.2f}", f"{peak / 1e9:.2f}", f"{peak / size:.2f}"])
    return lines


# By the first word of a row's name: (function of the row's arguments and --rounds, heading, note, columns).
PARTS: dict[str, tuple[Callable[..., Lines], str, str, tuple[str, ...]]] = {
    "sample": (
        sample, "Sampling", "Images/s (tokens only), plain and ours; seconds to decode an image.",
        ("row", "batch size", "unguided, plain", "ours", "ratio", "tokens that differ", "guided, plain",
         "ours", "ratio", "tokens that differ", "decoding"),
    ),
    "train": (
        train, "A training step", "Seconds and peak memory (MB) with plain and with chunked likelihoods.",
        ("row", "seconds, plain", "chunked", "ratio", "peak, plain", "chunked", "ratio"),
    ),
    "evaluate": (evaluate, "Evaluation", "Seconds of each part of the work.", ("row", "part", "seconds")),
    "read": (
        read, "Reading images", "Two data-loading workers; medians.", ("row", "layout", "images/s", "ratio"),
    ),
    "index": (
        index, "Opening a dataset", "Each in a process of its own.",
        ("row", "layout", "seconds", "MB held", "MB at the peak"),
    ),
    "load": (
        load, "Loading weights", "Ratio 1.00 is the size of the loaded weights (float32).",
        ("row", "format", "weights, GB", "additional peak memory, GB", "ratio"),
    ),
}  # fmt: skip
ROWS: dict[str, tuple] = {
    "sample-llamagen-b-256": ("llamagen-b", 256, 16, "float32"),
    "sample-llamagen-b-256-bfloat16": ("llamagen-b", 256, 16, "bfloat16"),
    "sample-var-d16": ("var-d16", None, 8, "float32"),
    "sample-var-d16-bfloat16": ("var-d16", None, 8, "bfloat16"),
    "sample-llamagen-mini": ("llamagen-mini", None, 64, "float32"),
    "sample-var-mini": ("var-mini", None, 64, "float32"),
    "train-llamagen-b": ("llamagen-b", None, 2),
    "train-var-d16": ("var-d16", None, 2),
    "train-llamagen-mini": ("llamagen-mini", None, 64),
    "train-var-mini": ("var-mini", None, 64),
    "evaluate": (50_000, 10_000, 128),
    "evaluate-mini": (2_000, 1_000, 32),
    "read": (2_000, 2),
    "read-mini": (100, 2),
    "index": (1_300_000,),
    "index-mini": (2_000,),
    "load-llamagen-xl": ("llamagen-xl",),
    "load-var-d30": ("var-d30",),
    "load-llamagen-mini": ("llamagen-mini",),
}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "benchmarks.cpu", OUTPUT)
    parser.add_argument("--rounds", type=count(), default=3, help="timed rounds (default: %(default)s)")
    args = parser.parse_args(argv)
    todo = select({name: ROWS[name] for name in ROWS if "mini" in name or not args.small}, args.only)
    if args.list:
        print("\n".join(todo))
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    report = Report(args.output or (None if args.only or args.small else OUTPUT), "On a CPU", args.command)
    for part, names in groupby(todo, lambda name: name.split("-")[0]):
        measure, *table = PARTS[part]
        report.table(*table)
        for name in names:
            for cells in in_child(measure, *todo[name], args.rounds):
                report.row(name, *cells)


if __name__ == "__main__":
    run_command(main)
