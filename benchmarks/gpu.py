"""Sampling, training, decoding and encoding of the full-size models on one GPU, in under ten minutes.

    python -m benchmarks.gpu                              # all rows, into results/gpu.md
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --only sample-var-d16-free-eager --only decode-var-256

sample: the tokens of a batch. images: tokens and pixels, with the default batch size. file: the same for
2,048 images, into an .npz without labels. train: an optimizer step on tokens, or (-images) on pixels.

Weights are random, so nothing is downloaded. Every row runs in a process of its own. --jobs rows are prepared
and compiled in parallel, then measured one after the other. Each row may use its share of --minutes and the
time that earlier rows left. A row that fails or takes longer says so, and the next row runs.

Times are medians after a warm-up and include the wait for the GPU. Compilation has a column of its own: by
how many seconds the first run was longer, in parallel with others. The shares compare with the limits of this
GPU (benchmarks/workloads.py), whose bandwidth and matmul rates are measured first. Rows whose matmuls and
convolutions are in float32, which a GPU rounds to TF32 (encoding, LlamaGen's decoder), are compared with the
TF32 rate, the others with the bfloat16 rate.
"""

import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._inductor import config as inductor

import sample
from benchmarks.table import Report, make_parser, select
from benchmarks.workloads import (
    Card,
    Work,
    measure_card,
    random_batch,
    random_model,
    recipe_config,
    sampling_work,
    timed,
    tokenizer_work,
    training_work,
)
from cca.cli.main import run_command
from cca.cli.parser import count, number
from cca.cli.parts import Parts, store, write_npz
from cca.config import SampleRequest
from cca.distributed import Ranks
from cca.sampling.sampler import Sampler, prepare
from cca.training.encoding import to_tokens
from cca.training.trainer import Trainer
from models import DTYPES, ZOO, ARImageModel, UserError
from models.utils.precision import allow_tf32

OUTPUT = Path("results/gpu.md")
SAMPLED, TRAINED = ("llamagen-b", "llamagen-xl", "var-d16", "var-d30"), ("llamagen-l", "var-d16")
TOKENIZERS = {  # model, tokenizer, and the number of images that fills the decoder's batches
    "llamagen-384": ("llamagen-b", None, 56),
    "var-256": ("var-d16", None, 64),
    "llamagen-384-finer": ("llamagen-b", "vq_ds8_c2i", 56),
    "var-512": ("var-d36", None, 32),
}
WITH_PIXELS = ("llamagen-b", "var-d16", "var-d30")
USERS_BATCH, FILE_IMAGES = 256, 2048
MINI = ("llamagen-mini", "var-mini")
COLUMNS = (
    "row", "batch size", "images/s", "peak memory, GB", "share of the limit by bytes",
    "by FLOPs", "compilation, s",
)  # fmt: skip
LONGEST_MEASURED, MOST_ROUNDS = 2.0, 20  # at most so many seconds and timed rounds per row
PATIENCE = 2.5  # a group of rows may use this many times its equal share of the remaining time
PREPARING = 0.7  # share of that time for preparing the rows, before they are measured


@dataclass(frozen=True)
class Row:
    """A row of the table.

    kind: the first word of the name.
    images: batch size; in training, the micro-batch size.
    from_pixels: whether training encodes its images.
    total: number of images in a file.
    """

    name: str
    kind: str
    model: str
    images: int
    tokenizer: str | None = None
    guided: bool = False
    compiled: bool = False
    from_pixels: bool = False
    total: int = 0


def rows(small: bool) -> dict[str, Row]:
    """Return all rows in the order in which they run; compiled rows, which take longest, come last."""
    sampled, trained, tokenizers, images, micro_batch = SAMPLED, TRAINED, TOKENIZERS, 64, 16
    with_pixels, batch, total, batches = WITH_PIXELS, USERS_BATCH, FILE_IMAGES, (256, 512)
    if small:
        sampled, trained, tokenizers = MINI, MINI, {name: (name, None, 2) for name in MINI}
        with_pixels, batch, total, batches = MINI, 3, 6, (3, 4)
        images = micro_batch = 2
    result = [Row(f"train-{name}", "train", name, micro_batch) for name in trained]
    result += [replace(result[-1], name=f"{result[-1].name}-images", from_pixels=True)]
    result += [
        Row(f"sample-{name}-{way}-eager", "sample", name, images, guided=way == "guided")
        for name, way in product(sampled, ("free", "guided"))
    ]
    result += [
        Row(f"{kind}-{name}", kind, model, batch_size, tokenizer)
        for kind, (name, (model, tokenizer, batch_size)) in product(("decode", "encode"), tokenizers.items())
    ]
    decoders = [f"decode-{name}" for name in [*tokenizers][:2]]
    result += [
        replace(row, name=f"{row.name.removesuffix('-eager')}-compiled", compiled=True)
        for row in result
        if row.kind in ("sample", "train") or row.name in decoders
    ]
    for name, way in product(with_pixels, ("free", "guided")):
        row = Row(f"images-{name}-{way}-compiled", "images", name, batch, None, way == "guided", True)
        result += [row]
        if way == "free" and name in with_pixels[:2]:
            result += [replace(row, name=f"file-{name}-free-compiled", kind="file", total=total)]
    result += [
        Row(f"sample-{with_pixels[0]}-{way}-compiled-{size}", "sample", with_pixels[0], size,
            guided=way == "guided", compiled=True)
        for size, way in product(batches, ("free", "guided"))
    ]  # fmt: skip
    return {row.name: row for row in result}


@dataclass(frozen=True)
class Prepared:
    """A row that is ready to be timed.

    run: the call to time; it may leave work queued on the GPU.
    images: number of images of a call.
    works: the minimal work of a call, for the roofline limits.
    """

    run: Callable[[], object]
    images: int
    works: tuple[Work, ...]


def request_of(row: Row, model: ARImageModel, device: torch.device) -> SampleRequest:
    """Return the request of sample.py with the settings of the published samples, guided or not."""
    options = ["--cfg-scale", "2" if row.guided else "1"]
    if ZOO[row.model].published:
        options = ["--preset", "published-cfg" if row.guided else "published"]
    images = row.total or row.images
    common = ["--model", row.model, "--num-samples", str(images), "--output", "unused.npz"]
    args = sample.make_parser().parse_args([*common, *options])
    sample.apply_preset(args)
    return sample.make_request(args, model, device)


def sampling(row: Row, device: torch.device) -> Prepared:
    model = random_model(row.model, device)
    request = request_of(row, model, device)
    prepare(model, request.dtype, device, row.compiled)
    sampler = Sampler(model, request, row.images, device, row.compiled)
    tokens = sampling_work(model, row.images, request.sampling, DTYPES[request.dtype])
    if row.kind == "sample":
        return Prepared(lambda: sampler.tokens(range(row.images)), row.images, (tokens,))
    pixels = tokenizer_work(row.model, None, False, row.images, DTYPES[sampler.decoder_dtype])
    if row.kind == "images":
        return Prepared(lambda: [*sampler.images([range(row.images)])], row.images, (tokens, pixels))
    works = (tokens, pixels) * (row.total // row.images)
    return Prepared(partial(sample_file, sampler, row.total), row.total, works)


def sample_file(sampler: Sampler, images: int) -> None:
    """Sample into an .npz without labels, through parts on disk."""
    resolution = sampler.request.eval_size or sampler.model.image_size
    with tempfile.TemporaryDirectory() as folder:
        shape = (images, resolution, resolution, 3)
        parts = Parts(Path(folder), shape, np.dtype(np.uint8), sample.PART_IMAGES)
        for _ in store(parts, [*parts.all()], sampler.images(parts.all())):
            pass
        write_npz(Path(folder, "samples.npz"), parts, None)


def training(row: Row, device: torch.device) -> Prepared:
    """Prepare an optimizer step of CCA on two micro-batches."""
    model, images = random_model(row.model, device), 2 * row.images
    config = recipe_config(row.model, images, sample.default_dtype(row.model, device))
    trainer = Trainer(model, config, row.images, Ranks(), compile=row.compiled)
    batch = random_batch(model, torch.zeros(images, dtype=torch.bool))
    works = [training_work(model, images, 2, DTYPES[config.dtype])]
    if row.from_pixels:
        batch = replace(batch, images=random_pixels(images, model))
        works.append(tokenizer_work(row.model, None, True, images, torch.float32))
    return Prepared(lambda: trainer.optimizer_step(0, batch), images, tuple(works))


def random_pixels(images: int, model: ARImageModel) -> Tensor:
    """Return random images uint8 [images, 3, H, W]."""
    return torch.randint(0, 256, (images, 3, model.image_size, model.image_size), dtype=torch.uint8)


def decoding(row: Row, device: torch.device) -> Prepared:
    model = random_model(row.model, device, tokenizer=row.tokenizer)
    request = request_of(row, model, device)
    tokens = torch.randint(0, model.vocab_size, (row.images, model.sequence_length), device=device)
    prepare(model, request.dtype, device, row.compiled)
    dtype = DTYPES[request.dtype if model.decodes_in_half_precision else "float32"]
    work = tokenizer_work(row.model, row.tokenizer, False, row.images, dtype)
    sampler = Sampler(model, request, row.images, device)
    return Prepared(lambda: sampler.decode(tokens), row.images, (work,))


def encoding(row: Row, device: torch.device) -> Prepared:
    """Prepare encoding as training on images does it."""
    model = random_model(row.model, device, tokenizer=row.tokenizer)
    pixels = random_pixels(row.images, model)
    work = tokenizer_work(row.model, row.tokenizer, True, row.images, torch.float32)
    return Prepared(lambda: to_tokens(model, pixels, device), row.images, (work,))


KINDS = {
    **dict.fromkeys(("sample", "images", "file"), sampling),
    "train": training,
    "decode": decoding,
    "encode": encoding,
}


@cache
def prepare_row(row: Row) -> Prepared:
    """Prepare a row in its child process, which keeps it from the first run to the measurement."""
    inductor.compile_threads = 4  # by default each row would start one thread per core
    device = Ranks().device
    allow_tf32(device)
    return KINDS[row.kind](row, device)


def run_first(row: Row) -> float:
    """Return the seconds of a row's first run, which selects kernels and compiles."""
    return timed(prepare_row(row).run)


def measure(row: Row, first: float, card: Card) -> list[str]:
    """Return the cells of a row; ``first`` is the duration of its first run in seconds."""
    prepared, has_gpu = prepare_row(row), torch.cuda.is_available()
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = [timed(prepared.run)]
    while len(seconds) < MOST_ROUNDS and sum(seconds) + seconds[-1] < LONGEST_MEASURED:
        seconds.append(timed(prepared.run))
    median = statistics.median(seconds)
    by_bytes, by_flops = card.shares(prepared.works, median)
    return [
        str(row.images),
        f"{prepared.images / median:.4g}",
        f"{torch.cuda.max_memory_allocated() / 1e9:.2f}" if has_gpu else "",
        f"{by_bytes:.1%}",
        f"{by_flops:.1%}",
        f"{first - median:.1f}" if row.compiled else "",
    ]


def wait_for_result(task: AsyncResult, end: float) -> Any:
    """Return a child process's result by ``end`` (of ``time.monotonic``), or a str with its error."""
    try:
        return task.get(max(end - time.monotonic(), 0))
    except multiprocessing.TimeoutError:
        return "it took longer than its share of --minutes"
    except Exception as error:  # any error of a row goes into its cell
        message = " ".join(str(error).split()).replace("|", "/")[:160]
        return f"{type(error).__name__}: {message}"


def split_into_groups(todo: list[Row], jobs: int) -> list[list[Row]]:
    """Return groups of at most ``jobs`` rows that are prepared in parallel.

    Rows of one kind need about as much memory, so they go into different groups.
    """
    groups = []
    for compiled in (False, True):
        part = [row for row in todo if row.compiled == compiled]
        size = math.ceil(len(part) / jobs)
        groups += [part[start::size] for start in range(size)]
    return groups


def run_group(group: list[Row], card: Card, seconds: float) -> Iterator[tuple[str, list[str]]]:
    """Prepare the rows in parallel, measure one after the other, and yield the name and cells of each.

    Each row has a child process, so that a GPU error or a row that takes too long does not affect the others.
    """
    began, context = time.monotonic(), multiprocessing.get_context("spawn")
    pools = [context.Pool(1) for _ in group]
    first_runs = [pool.apply_async(run_first, [row]) for pool, row in zip(pools, group)]
    firsts = [wait_for_result(task, began + PREPARING * seconds) for task in first_runs]
    for pool, first in zip(pools, firsts):
        if isinstance(first, str):
            pool.terminate()
    for row, pool, result in zip(group, pools, firsts):
        if not isinstance(result, str):
            result = wait_for_result(pool.apply_async(measure, [row, result, card]), began + seconds)
        pool.terminate()
        yield row.name, [str(row.images), f"failed: {result}"] if isinstance(result, str) else result


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "benchmarks.gpu", OUTPUT)
    add = parser.add_argument
    add(
        "--minutes",
        type=number(0.1),
        default=9.5,
        help="total time for all rows, in minutes (default: %(default)s)",
    )
    add(
        "--jobs",
        type=count(),
        default=4,
        help="rows prepared in parallel (default: %(default)s, for 80 GB of GPU memory)",
    )
    args = parser.parse_args(argv)
    todo = select(rows(args.small), args.only)
    if args.list:
        print("\n".join(todo))
        return
    if not args.small and not torch.cuda.is_available():
        raise UserError("--small: must be set, because there is no GPU; it measures the bundled mini models")
    report = Report(args.output or (None if args.only or args.small else OUTPUT), "On a GPU", args.command)
    end, card = time.monotonic() + 60 * args.minutes, measure_card(Ranks().device)
    torch.cuda.empty_cache()  # leaves the memory to the child processes
    note = (
        f"Measured rates: copies {card.bandwidth / 1e12:.3g} TB/s, "
        f"bfloat16 matmuls {card.half / 1e12:.3g} TFLOP/s, "
        f"TF32 matmuls {card.single / 1e12:.3g} TFLOP/s (on a CPU: float32)."
    )
    report.table("Rows", note, COLUMNS)
    groups = split_into_groups([*todo.values()], args.jobs)
    for index, group in enumerate(groups):
        seconds_left, rows_left = end - time.monotonic(), sum(map(len, groups[index:]))
        seconds = min(seconds_left, PATIENCE * seconds_left * len(group) / rows_left)
        for name, cells in run_group(group, card, seconds):
            report.row(name, *cells)


if __name__ == "__main__":
    run_command(main)
