"""Sample images from a VAR or LlamaGen model, without guidance unless asked, into one .npz.

    python sample.py --model var-mini --num-samples 1000 --output samples.npz --grid grid.png
    python sample.py --model var-mini --weights runs/var-mini-cca/model.pth --output cca.npz
    python sample.py --model var-mini --weights runs/var-mini-cca --output running.npz   # or its newest state
    torchrun --nproc_per_node 2 sample.py --model llamagen-mini --cfg-scale 1.5 --output guided.npz
    torchrun --nproc_per_node 8 sample.py --model var-d16 --weights cca --preset published --output d16.npz

FILE.npz holds arr_0 uint8 [N, H, W, 3] and arr_1 int64 [N] (classes); FILE.json beside it holds
every option, the weights' SHA-256, versions and images per second. An interrupted run, started
again with the same command, goes on where it stopped; a finished one is left as it is.
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
from cca.cli.parts import Parts, make_missing_parts, write_npz
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

PART_IMAGES = 256  # images of a part
# Where neither an option nor a preset says otherwise.
DEFAULTS = {
    "num_samples": 50_000, "class_order": "balanced", "cfg_scale": 1.0, "top_k": 0, "top_p": 1.0,
    "temperature": 1.0, "eval_size": None,
}  # fmt: skip


def make_parser() -> Parser:
    parser = Parser(__doc__, "sample")
    add = parser.add_argument
    add_model_options(parser, ZOO, "base|cca|PATH|RUN[/state/step-N][:ema]|hf://ORG/REPO/FILE")
    add(
        "--preset", choices=("published", "published-cfg"),
        help="sampling settings behind the published figures, without or with guidance; options overrule it",
    )  # fmt: skip
    add("--num-samples", **limits_of(SampleRequest, "num_samples"), help="images (default 50000)")
    add(
        "--classes",
        metavar="all|0,7,8",
        help="classes to sample (default: of a run those that it was trained on, else all)",
    )
    add(
        "--class-order",
        **limits_of(SampleRequest, "class_order"),
        help="classes in turn, or drawn uniformly (default balanced)",
    )
    add(
        "--cfg-scale",
        **limits_of(SamplingOptions, "cfg_scale"),
        help="guidance scale s: uncond + s (cond - uncond); 1 is guidance-free (default 1.0)",
    )
    add(
        "--cfg-schedule",
        **limits_of(SamplingOptions, "cfg_schedule"),
        help="scale over the decoding steps (default: VAR linear, LlamaGen constant)",
    )
    add(
        "--cfg-interval",
        **limits_of(SamplingOptions, "cfg_interval"),
        help="guide only the first this many steps (LlamaGen: tokens, VAR: levels; default all)",
    )
    add(
        "--top-k",
        **limits_of(SamplingOptions, "top_k"),
        help="keep the k likeliest tokens; 0 keeps all (default 0)",
    )
    add(
        "--top-p",
        **limits_of(SamplingOptions, "top_p"),
        help="keep the likeliest tokens with this much probability (default 1.0)",
    )
    add("--temperature", **limits_of(SamplingOptions, "temperature"), help="divides the logits (default 1.0)")
    add(
        "--eval-size",
        **limits_of(SampleRequest, "eval_size"),
        help="resize to this side, bicubic, before the 8-bit conversion (pixels; default: no resizing)",
    )
    add(
        "--seed", **limits_of(SampleRequest, "seed"), default=0, help="seed of classes and tokens (default 0)"
    )
    add(
        "--batch-size",
        type=count(),
        help="images decoded at once in a process (default: 64; on a GPU what its memory holds, 256 at most)",
    )
    add(
        "--dtype",
        **limits_of(SampleRequest, "dtype"),
        help="precision (default: the preset's, else float32; on a GPU the model's published one)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile decoding, and on a GPU replay it as CUDA graphs; an H100 takes 40 s for it with "
        "llamagen-b, 67 with var-d16, and draws 21 and 3 times as fast (default: as what is there of the run "
        f"was made; else on a GPU from {COMPILED_FROM[True]:,} images of each process on, VAR from "
        f"{COMPILED_FROM[False]:,})",
    )
    add("--output", required=True, type=Path, metavar="FILE.npz", help="where the samples go")
    add(
        "--grid",
        type=Path,
        metavar="FILE.png",
        help="also write a picture of the first images, with class names",
    )
    add_dry_run_option(parser)
    return parser


def apply_preset(args: argparse.Namespace) -> None:
    """Fill in the options that were not given, from the preset or the defaults."""
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
    """The published precision on a GPU, where float32 is ten times slower; float32 on a CPU."""
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
    """What parsed options, the preset applied, ask of this model. Raises UserError."""
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
    """A sample file to be made, resolved from the options and from what was found at the output."""

    args: argparse.Namespace
    ranks: Ranks
    found: OutputStatus
    files: ModelFiles
    model: ARImageModel
    request: SampleRequest

    def __post_init__(self) -> None:
        args, device, request = self.args, self.ranks.device, self.request
        size = request.eval_size or self.model.image_size
        shape = (request.num_samples, size, size, 3)
        self.output = Output.npz(args.output, "samples")
        self.parts = Parts(self.output.parts_folder, shape, np.dtype(np.uint8), PART_IMAGES)
        before = self.found.options.get("compile")  # a run that is resumed keeps its way
        self.downloads = self.files.downloads(self.model)
        self.batch_size = args.batch_size or default_batch_size(self.model, request, device)
        default = compiles_by_default(self.model, request, device, self.ranks.world_size)
        asked = before if args.compile is None else args.compile
        if self.found.is_finished:  # nothing is compiled any more
            self.compile = bool(asked)
        else:
            self.compile = decide_compile(asked, default, self.ranks)

    def identity(self) -> dict:
        request, trained = asdict(self.request), self.files.config.get("options", {})
        loss = {key: trained[key] for key in ("loss",) if key in trained}  # eval_fid.py reads it
        known = {**request.pop("sampling"), **self.files.provenance(), **loss, "compile": self.compile}
        return {**request, **known}

    def plan(self) -> dict[str, str]:
        request, options = self.request, self.request.sampling
        count, height, width, _ = self.parts.shape
        if self.found.is_finished:
            self.check_finished()
        guidance = "no guidance"
        if options.cfg_scale != 1:
            guidance = f"guidance {options.cfg_scale:g} ({options.cfg_schedule})"
        filters = (
            f"temperature {options.temperature:g}, top-k {options.top_k or 'all'}, top-p {options.top_p:g}"
        )
        classes = f"{len(request.classes)} classes {request.class_order}"
        size = size_text(count * self.parts.row_bytes)
        written = [f"{self.output.path} (~{size})", self.output.path.with_suffix(".json"), self.args.grid]
        return self.files.plan(self.model) | {
            "samples": f"{count:,} of {width} x {height} pixels, {classes}, seed {request.seed}",
            "drawing": f"{guidance}, {filters}",
            "device": f"{self.ranks.devices}, {request.dtype}, "
            f"batch {self.batch_size}, {'compiled' if self.compile else 'eager'}",
            "writes": ", ".join(str(path) for path in written if path),
        }

    def check_finished(self) -> None:
        """Raise UserError where the file is not what its description says."""
        path = self.output.path
        try:
            images = NpzImages(path)
            fits = (len(images), *images.size, 3) == self.parts.shape
        except (UserError, AttributeError):
            fits = False
        if not fits:
            raise UserError(
                f"--output: {path} is not what {path.stem}.json describes; remove it to sample anew"
            )

    def prepare(self) -> dict:
        self.files = self.files.load_into(self.model)
        self.content = {"options": self.identity()}
        return self.content

    def work(self) -> bool:
        ranks, began = self.ranks, time.perf_counter()
        ready: list[Sampler] = []
        ranks.run_or_abort_all(lambda: ready.append(self.make_sampler()))
        loaded, stored = time.perf_counter(), self.parts.rows_stored()
        title, started = f"sampling {self.args.output.name}", "compiling" if self.compile else ""
        if not make_missing_parts(ranks, self.parts, ready[0].images, title, started):
            return False
        made, ended = self.parts.shape[0] - stored, time.perf_counter()
        report = {
            "command": ranks.command(self.args.command),
            **self.content,
            "batch_size": self.batch_size,
            "processes": ranks.world_size,
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
            "images_made_by_this_run": made,
            "images_per_second": made / (ended - loaded) if made else None,
            "wall_seconds": ended - began,
        }
        if ranks.is_main:  # the others need not wait, which they could for half an hour
            self.finish(report)
        return True

    def make_sampler(self) -> Sampler:
        prepare(self.model, self.request.dtype, self.ranks.device, self.compile)
        return Sampler(self.model, self.request, self.batch_size, self.ranks.device, self.compile)

    def finish(self, report: dict) -> None:
        """Write the description, then the file: an output that is there has a description."""
        labels = (np.array([class_of(i, self.request) for i in part], np.int64) for part in self.parts.all())
        self.output.describe(report)
        write_npz(self.output.path, self.parts, labels)
        self.output.remove_parts()

    def write_grid(self) -> None:
        """Write the picture of the first images, with the names of their classes."""
        columns = min(len(self.request.classes), 10)
        names = class_names(self.files.config.get("data"), self.model.num_classes)
        count = min(8 * columns, self.request.num_samples)
        (images,) = NpzImages(self.output.path).batches(slice(0, count), count)
        with writing(self.args.grid):
            self.args.grid.parent.mkdir(parents=True, exist_ok=True)
        classes = [class_of(i, self.request) for i in range(count)]
        write_grid(images, self.args.grid, columns, [names[c] for c in classes], classes)


def resolve(args: argparse.Namespace, ranks: Ranks, found: OutputStatus) -> Sampling:
    files = find_files(args.model, args.weights, args.tokenizer_weights, args.image_size)
    model, trained = files.build(), files.config.get("data", {}).get("labels")
    if trained and args.classes is None:
        args.classes = ",".join(map(str, trained))
        if ranks.is_main:
            print(
                f"note: classes {args.classes}, on which {args.weights} was trained; --classes all takes all"
            )
    return Sampling(args, ranks, found, files, model, make_request(args, model, ranks.device))


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
