"""Sample images from a VAR or LlamaGen model into one .npz. The default is to sample without guidance.

    python sample.py --model var-mini --num-samples 1000 --output samples.npz --grid grid.png
    python sample.py --model var-mini --weights runs/var-mini-cca/model.pth --output cca.npz
    python sample.py --model var-mini --weights runs/var-mini-cca --output running.npz   # a run
    torchrun --nproc_per_node 2 sample.py --model llamagen-mini --cfg-scale 1.5 --output guided.npz
    torchrun --nproc_per_node 8 sample.py --model var-d16 --weights cca --preset published --output d16.npz

FILE.npz holds arr_0 uint8 [N, H, W, 3] and arr_1 int64 [N] (classes). FILE.json beside it holds every
option, the SHA-256 of the weights, versions and images per second. Run the same command again to resume
after an interruption. A finished file is left as it is.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from cca.cli.compilation import decide_compile
from cca.cli.main import play, run_command
from cca.cli.output import Output, OutputStatus
from cca.cli.parser import Parser, add_model_options, count, limits_of
from cca.cli.parts import Parts, make_in_parts, write_npz
from cca.cli.plan import add_dry_run_option
from cca.config import SampleRequest
from cca.data.image_sets import NpzImages
from cca.data.labels import class_names
from cca.distributed import Ranks
from cca.sampling.batch_size import COMPILED_FROM, compiles_by_default, default_batch_size
from cca.sampling.grid import write_grid
from cca.sampling.sampler import Sampler, class_of, prepare
from models import ZOO, ARImageModel, SamplingOptions, UserError, zoo_entry
from models.utils.files import size_text, writing
from models.zoo.loading import ModelFiles, find_files

PART_IMAGES = 256  # images per part
# Values of options that neither the command line nor a preset sets.
DEFAULTS = {
    "num_samples": 50_000, "class_order": "balanced", "cfg_scale": 1.0, "top_k": 0, "top_p": 1.0,
    "temperature": 1.0, "eval_size": None,
}  # fmt: skip


def make_parser() -> Parser:
    parser = Parser(__doc__, "sample")
    add_model_options(parser, ZOO, "base|cca|PATH|RUN[/state/step-N][:ema]|hf://ORG/REPO/FILE")

    add = parser.group("data").add_argument
    add("--num-samples", **limits_of(SampleRequest, "num_samples"), help="images to sample (default: 50000)")
    add(
        "--classes",
        metavar="all|0,7,8",
        help="numbers of the classes to sample (default: the classes that a run was trained on, else all)",
    )
    add(
        "--class-order",
        **limits_of(SampleRequest, "class_order"),
        help="order of the classes: balanced takes them in turn, random samples them uniformly "
        "(default: balanced)",
    )

    add = parser.group("method").add_argument
    add(
        "--preset", choices=("published", "published-cfg"),
        help="settings of the published figures: without guidance (published) or with it (published-cfg); "
        "options override them (default: none)",
    )  # fmt: skip
    add(
        "--cfg-scale",
        **limits_of(SamplingOptions, "cfg_scale"),
        help="guidance scale s in logits = uncond + s (cond - uncond); 1 is guidance-free (default: 1)",
    )
    add(
        "--cfg-schedule",
        **limits_of(SamplingOptions, "cfg_schedule"),
        help="guidance scale over the decoding steps: linear grows from 1 to --cfg-scale "
        "(default: VAR linear, LlamaGen constant)",
    )
    add(
        "--cfg-interval",
        **limits_of(SamplingOptions, "cfg_interval"),
        help="number of first decoding steps with guidance; LlamaGen: tokens, VAR: levels (default: all)",
    )
    add(
        "--top-k",
        **limits_of(SamplingOptions, "top_k"),
        help="number of most likely tokens to sample from; 0 is all (default: 0)",
    )
    add(
        "--top-p",
        **limits_of(SamplingOptions, "top_p"),
        help="total probability of the most likely tokens to sample from, up to 1 (default: 1)",
    )
    add(
        "--temperature",
        **limits_of(SamplingOptions, "temperature"),
        help="divisor of the logits (default: 1)",
    )
    add(
        "--seed",
        **limits_of(SampleRequest, "seed"),
        default=0,
        help="random seed of classes and tokens (default: 0)",
    )

    add = parser.group("performance").add_argument
    add(
        "--batch-size",
        type=count(),
        help="images per batch and rank (default: on a GPU the largest power of two that fits in its memory, "
        "at most 256; on a CPU 64)",
    )
    add(
        "--dtype",
        **limits_of(SampleRequest, "dtype"),
        help="precision of the transformer (default: the preset's; without a preset, on a GPU the model's "
        "published one, on a CPU float32)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="run decoding through torch.compile, and on a GPU replay it as CUDA graphs; on one H100, "
        "llamagen-b compiles in 40 s and then samples 21 times as fast, var-d16 in 67 s and 3 times "
        f"(default: on for GPU runs of at least {COMPILED_FROM[True]:,} images per rank, for VAR "
        f"{COMPILED_FROM[False]:,}). A resumed run keeps its value.",
    )

    add = parser.group("output").add_argument
    add("--output", required=True, type=Path, metavar="FILE.npz", help="file to write")
    add(
        "--eval-size",
        **limits_of(SampleRequest, "eval_size"),
        help="resolution to which images are resized, bicubic, before the 8-bit conversion, in pixels "
        "(default: no resizing)",
    )
    add(
        "--grid",
        type=Path,
        metavar="FILE.png",
        help="picture to write of the first images, with class names (default: none)",
    )
    add_dry_run_option(parser)
    return parser


def apply_preset(args: argparse.Namespace) -> None:
    """Set the options that the command line leaves out, from the preset or from ``DEFAULTS``."""
    values = dict(DEFAULTS)
    if args.preset:
        published = zoo_entry(args.model).published
        if published is None:
            raise UserError(f"--preset: {args.model} has no published settings")
        names = ("class_order", "top_k", "top_p", "eval_size", "dtype")
        values |= {name: getattr(published, name) for name in names}
        values["cfg_scale"] = published.cfg_scale if args.preset == "published-cfg" else 1.0
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def default_dtype(model: str, device: torch.device) -> str:
    """Return the published precision on a GPU, where float32 is ten times slower; on a CPU, float32."""
    entry = ZOO[model]
    if device.type == "cpu":
        return "float32"
    return entry.published.dtype if entry.published else next(iter(entry.recipes.values())).dtype


def parse_classes(text: str, model: ARImageModel) -> tuple[int, ...]:
    if text == "all":
        return tuple(range(model.num_classes))
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--classes: {text!r} is neither 'all' nor a list such as 0,7,8") from None


def make_request(args: argparse.Namespace, model: ARImageModel, device: torch.device) -> SampleRequest:
    """Return the request that the options, with the preset applied, make of this model. Raises UserError."""
    schedule = args.cfg_schedule or model.default_cfg_schedule
    sampling = SamplingOptions(
        args.cfg_scale, schedule, args.cfg_interval, args.top_k, args.top_p, args.temperature
    )
    classes = parse_classes("all" if args.classes is None else args.classes, model)
    dtype = args.dtype or default_dtype(args.model, device)
    request = SampleRequest(
        args.num_samples, classes, args.class_order, args.seed, args.eval_size, dtype, sampling
    )
    request.check_classes(model.num_classes)
    return request


@dataclass
class Sampling:
    """The job of writing a sample file, resolved from the options and the status of the output."""

    args: argparse.Namespace
    ranks: Ranks
    status: OutputStatus
    files: ModelFiles
    model: ARImageModel
    request: SampleRequest

    def __post_init__(self) -> None:
        args, device, request = self.args, self.ranks.device, self.request
        size = request.eval_size or self.model.image_size
        shape = (request.num_samples, size, size, 3)
        self.output = Output.npz(args.output, "samples")
        self.parts = Parts(self.output.parts_folder, shape, np.dtype(np.uint8), PART_IMAGES)
        self.downloads = self.files.downloads(self.model)
        self.batch_size = args.batch_size or default_batch_size(self.model, request, device)
        default = compiles_by_default(self.model, request, device, self.ranks.world_size)
        self.compile = decide_compile(args.compile, default, self.status, self.ranks)

    def identity(self) -> dict:
        request, training = asdict(self.request), self.files.config.get("options", {})
        loss = {key: training[key] for key in ("loss",) if key in training}  # eval_fid.py reads it
        sampling = request.pop("sampling")
        return {**request, **sampling, **self.files.provenance(), **loss, "compile": self.compile}

    def plan(self) -> dict[str, str]:
        request, options = self.request, self.request.sampling
        count, height, width, _ = self.parts.shape
        if self.status.is_finished:
            self.check_finished()
        guidance = "no guidance"
        if options.cfg_scale != 1:
            guidance = f"guidance {options.cfg_scale:g} ({options.cfg_schedule})"
        filters = (
            f"temperature {options.temperature:g}, top-k {options.top_k or 'all'}, top-p {options.top_p:g}"
        )
        classes = f"{len(request.classes)} classes {request.class_order}"
        size = size_text(count * self.parts.row_bytes)
        files = [f"{self.output.path} (~{size})", self.output.path.with_suffix(".json"), self.args.grid]
        return self.files.plan(self.model) | {
            "samples": f"{count:,} of {width} x {height} pixels, {classes}, seed {request.seed}",
            "sampling": f"{guidance}, {filters}",
            "device": f"{self.ranks.devices}, {request.dtype}, "
            f"batch {self.batch_size}, {'compiled' if self.compile else 'eager'}",
            "writes": ", ".join(str(path) for path in files if path),
        }

    def check_finished(self) -> None:
        """Raise UserError if the images do not have the shape that the description says."""
        path = self.output.path
        try:
            images = NpzImages(path)
            fits = (len(images), *images.size, 3) == self.parts.shape
        except (UserError, AttributeError):
            fits = False
        if not fits:
            raise UserError(
                f"--output: {path} is not what {path.stem}.json describes; remove it to sample again"
            )

    def prepare(self) -> dict:
        self.files = self.files.load_into(self.model)
        return {"options": self.identity()}

    def work(self, content: dict) -> bool:
        """Sample the missing parts; rank 0 writes the file. Return False if a signal stopped the run."""
        ranks, start = self.ranks, time.perf_counter()
        samplers: list[Sampler] = []
        ranks.run_or_abort_all(lambda: samplers.append(self.make_sampler()))
        sampling_start, resumed_images = time.perf_counter(), self.parts.rows_stored()
        title, first_status = f"sampling {self.args.output.name}", "compiling" if self.compile else ""

        def finish() -> None:
            new_images, end = self.parts.shape[0] - resumed_images, time.perf_counter()
            report = {
                "command": ranks.command(self.args.command),
                **content,
                "batch_size": self.batch_size,
                "processes": ranks.world_size,
                "threads": torch.get_num_threads(),
                "versions": {"torch": torch.__version__, "numpy": np.__version__},
                "images_made_by_this_run": new_images,
                "images_per_second": new_images / (end - sampling_start) if new_images else None,
                "wall_seconds": end - start,
            }
            self.write(report)

        return make_in_parts(ranks, self.parts, samplers[0].images, finish, title, first_status)

    def make_sampler(self) -> Sampler:
        prepare(self.model, self.request.dtype, self.ranks.device, self.compile)
        return Sampler(self.model, self.request, self.batch_size, self.ranks.device, self.compile)

    def write(self, report: dict) -> None:
        """Write the description before the file, so that a file always has its description."""
        labels = (np.array([class_of(i, self.request) for i in part], np.int64) for part in self.parts.all())
        self.output.describe(report)
        write_npz(self.output.path, self.parts, labels)

    def write_grid(self) -> None:
        """Write a picture of the first images, with the names of their classes."""
        columns = min(len(self.request.classes), 10)
        names = class_names(self.files.config.get("data"), self.model.num_classes)
        count = min(8 * columns, self.request.num_samples)
        (images,) = NpzImages(self.output.path).batches(slice(0, count), count)
        with writing(self.args.grid):
            self.args.grid.parent.mkdir(parents=True, exist_ok=True)
        classes = [class_of(i, self.request) for i in range(count)]
        write_grid(images, self.args.grid, columns, [names[c] for c in classes], classes)


def resolve(args: argparse.Namespace, ranks: Ranks, status: OutputStatus) -> Sampling:
    """Return the job; --classes becomes the classes of the training run, if it has some. Raises UserError."""
    files = find_files(args.model, args.weights, args.tokenizer_weights, args.image_size)
    model, labels = files.build(), files.config.get("data", {}).get("labels")
    if labels and args.classes is None:
        args.classes = ",".join(map(str, labels))
        if ranks.is_main:
            print(
                f"note: --classes is {args.classes}, the classes on which {args.weights} was trained; "
                "use --classes all for all of them"
            )
    return Sampling(args, ranks, status, files, model, make_request(args, model, ranks.device))


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    apply_preset(args)
    output = Output.npz(args.output, "samples")
    output.check_place(suffix=".npz")
    if args.grid:
        Output(args.grid, option="--grid").check_place(suffix=".png")
    job = play(args, output, resolve)
    if job and args.grid and job.ranks.is_main:
        job.write_grid()


if __name__ == "__main__":
    run_command(main)
