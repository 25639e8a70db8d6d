"""What the dry run counts, and what an H100 would make of it: predicted, not measured.

    python -m benchmarks.predict    # minutes of one CPU core and no GPU, but a CUDA build of PyTorch

It ends with a table of what benchmarks.gpu measured beside it.

Kernels, bytes and FLOPs are those of the real code on a pretended GPU (benchmarks/pretended); kernels of
compiled steps come from Inductor's code. Times are a model of their cost: each kernel takes as long as its
bytes or FLOPs do at the rates below, at least IN_GRAPH; launched one by one by the host, at least LAUNCH.
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks import limits
from benchmarks.gpu_rows import Row
from benchmarks.limits import Card, Work
from benchmarks.measured import alike, comparison, of_the_last_machine
from benchmarks.pretended import runs
from benchmarks.pretended.recorder import Event, Recorder
from models import DTYPES, ZOO, SamplingOptions
from models.errors import run_command
from models.loading import build_model
from models.options import Parser
from models.tables import markdown_table

# An H100 as others have measured it: bytes/s of its memory and of its cache, which holds CACHE bytes;
# FLOP/s of products in half precision, of convolutions in TF32, of products in float32.
H100 = Card(bandwidth=3.0e12, rate=700e12)
CACHE_BANDWIDTH, CACHE = 5.0e12, 30e6
TF32, SINGLE = 200e12, 45e12
LAUNCH, IN_GRAPH = 5e-6, 1.8e-6  # seconds per kernel
IMAGES, MICRO_BATCH = 64, 16
MOST_STEPS = 10


def gpu_seconds(event: Event) -> float:
    half = event.dtype in (torch.float16, torch.bfloat16)
    rate = H100.rate if half else TF32 if event.operator.startswith("convolution") else SINGLE
    bandwidth = CACHE_BANDWIDTH if event.bytes < CACHE else H100.bandwidth
    return max(IN_GRAPH * event.kernels, event.bytes / bandwidth, event.flops / rate)


class Cost:
    """Of some events: kernels, and seconds in a graph and launched one by one."""

    def __init__(self, events: Iterable[Event] = ()):
        found = list(events)
        self.kernels = sum(event.kernels for event in found)
        self.in_graph = sum(map(gpu_seconds, found))

    @property
    def one_by_one(self) -> float:
        return max(self.in_graph, LAUNCH * self.kernels)

    def combined(self, other: "Cost", factor: float) -> "Cost":
        """This and ``factor`` times the other."""
        result = Cost()
        result.kernels = round(self.kernels + factor * other.kernels)
        result.in_graph = self.in_graph + factor * other.in_graph
        return result


def phase(recorder: Recorder, name: str) -> Cost:
    return Cost(event for event in recorder.events if event.phase == name)


def least(work: Work) -> float:
    return max(H100.shares(work, 1.0))


def dtype_of(name: str) -> str:
    return ZOO[name].recipes["cca"].dtype


def generated(name: str, steps: int, **options) -> Cost:
    """The first ``steps`` decoding steps of a batch, from what a second block adds to one."""
    depth = len(build_model(name).transformer.transformer_blocks())
    one, two = (
        phase(runs.sampled(name, IMAGES, dtype_of(name), layers=layers, steps=steps, **options), "generate")
        for layers in (1, 2)
    )
    return one.combined(two.combined(one, -1), depth - 1)


def sampled(name: str, guided: bool) -> list[str]:
    """Of many equal steps the first few run; to the others the longer cache is added, in bytes."""
    settings, model, dtype = ZOO[name].published, build_model(name), dtype_of(name)
    assert settings is not None
    options = {"top_k": settings.top_k, "top_p": settings.top_p}
    options["cfg_scale"] = settings.cfg_scale if guided else 1.0
    steps = len(model.step_sizes)
    run = min(steps, MOST_STEPS)
    several = generated(name, run, **options)
    last = several.combined(generated(name, run - 1, **options), -1)
    batch = several.combined(last, steps - run)
    model.transformer.store_matrices(DTYPES[dtype])
    work = limits.sampling(model, IMAGES, SamplingOptions(**options))
    if run < steps:
        uncached = limits.sampling(model, IMAGES, SamplingOptions(**options), cache_bytes=0)
        batch.in_graph += (work.bytes - uncached.bytes) / H100.bandwidth
    compiled, writer = runs.compiled_steps(name, IMAGES, dtype, **options)
    speeds = (IMAGES / seconds for seconds in (batch.one_by_one, batch.in_graph, least(work)))
    return [
        f"{name}, {'guided' if guided else 'free'}",
        f"{last.kernels:,}",
        f"{compiled:,}",
        f"{len(writer.graphs)}, {len(writer.sources)}",
        f"{batch.kernels:,}",
        *(f"{speed:,.0f}" for speed in speeds),
    ]


def trained(name: str) -> list[str]:
    """Of the step of two micro-batches, from what a third block adds to two."""
    model = build_model(name)
    depth = len(model.transformer.transformer_blocks())
    two, three = (runs.trained(name, MICRO_BATCH, dtype_of(name), "cca", layers=n) for n in (2, 3))
    step = phase(two, "step 1")
    step = step.combined(phase(three, "step 1").combined(step, -1), depth - 2)
    per_micro_batch, per_step = runs.waits_of_training(two)
    images = 2 * MICRO_BATCH
    speeds = (images / s for s in (step.one_by_one, step.in_graph, least(limits.training(model, images, 2))))
    counts = (step.kernels, *runs.kernels_of_likelihood(name, dtype_of(name)), per_micro_batch, per_step)
    return [name, *(f"{number:,}" for number in counts), *(f"{speed:,.0f}" for speed in speeds)]


def coded(name: str, tokenizer: str | None, encode: bool) -> list[str]:
    model = build_model(name, tokenizer=tokenizer)
    half = not encode and model.decodes_in_half_precision
    if encode:
        cost, compiled = phase(runs.encoded(name, IMAGES, tokenizer), "encode"), ""
    else:
        cost = phase(runs.decoded(name, IMAGES, dtype_of(name), tokenizer=tokenizer), "decode")
        writer = runs.compiled_decoder(name, IMAGES, dtype_of(name), tokenizer)
        compiled = f"{writer.kernels().total():,}"
    work = limits.tokenizer(name, tokenizer, encode, IMAGES, 2 if half else 4)
    speeds = (IMAGES / seconds for seconds in (cost.one_by_one, cost.in_graph, least(work)))
    what = f"{'encode' if encode else 'decode'}, {tokenizer or ZOO[name].tokenizer}"
    return [what, f"{cost.kernels:,}", compiled, *(f"{speed:,.0f}" for speed in speeds)]


SPEEDS = ("images/s, launched one by one", "in a graph", "limit")
SAMPLED, TRAINED = ("llamagen-b", "llamagen-xl", "var-d16", "var-d30"), ("llamagen-l", "var-d16")
CODED = (("llamagen-b", None), ("llamagen-b", "vq_ds8_c2i"), ("var-d16", None), ("var-d36", None))


def speed(row: list[str]) -> float:
    return float(row[-3].replace(",", ""))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, "benchmarks.predict")
    parser.add_argument(
        "--measured", type=Path, default=Path("results/gpu.md"), metavar="FILE",
        help="a table of benchmarks.gpu (default %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    of_the_last_machine(args.measured)  # or an error now
    torch.set_num_threads(1)
    predicted = {}
    print("Predicted for an H100, not measured.\n")
    print(f"Sampling, {IMAGES} images at once, with the settings of the published samples:\n")
    table = []
    for name in SAMPLED:
        for guided in (False, True):
            table.append(sampled(name, guided))
            predicted[alike(Row("", "sample", name, 0, guided=guided))] = speed(table[-1])
    compiled = ("the same compiled", "graphs, and kernels, to compile")
    kernels = ("kernels of a token or of the last level", *compiled, "of a batch")
    print(markdown_table(("model", *kernels, *SPEEDS), table), flush=True)
    print(f"\nAn optimizer step of CCA, two micro-batches of {MICRO_BATCH} images:\n")
    kernels = ("kernels", "of the likelihood of a chunk of tokens", "the same compiled")
    waits = ("host waits of a micro-batch", "of a step besides")
    table = [trained(name) for name in TRAINED]
    predicted |= {alike(Row("", "train", name, 0)): speed(row) for name, row in zip(TRAINED, table)}
    print(markdown_table(("model", *kernels, *waits, *SPEEDS), table), flush=True)
    print(f"\n{IMAGES} images through the tokenizers, to tokens and back:\n")
    table = []
    for kind in ("decode", "encode"):
        for name, tokenizer in CODED:
            table.append(coded(name, tokenizer, kind == "encode"))
            predicted[alike(Row("", kind, name, 0, tokenizer))] = speed(table[-1])
    print(markdown_table(("what", "kernels", "the same compiled", *SPEEDS), table))
    print(f"\nAnd measured, on one {comparison(args.measured, predicted)}")


if __name__ == "__main__":
    run_command(main)
