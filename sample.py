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
from pathlib import Path

import torch

from cca.data.image_sets import NpzImages
from cca.distributed import Processes
from cca.sampling.fitting import COMPILED_FROM, compiles_by_default, default_batch_size
from cca.sampling.grid import write_grid
from cca.sampling.sample_file import open_store, run_sampling
from cca.sampling.sampler import SampleRequest
from cca.training.weights import choose_weights
from models import DTYPES, ZOO, ARImageModel, SamplingOptions, UserError, zoo_entry
from models.decoding import LOWEST_TEMPERATURE
from models.errors import run_command
from models.files import writing
from models.options import Parser, add_model_options, count, number
from models.outputs import check_output
from models.plan import add_dry_run_option, show_plan, size_text

# Where neither an option nor a preset says otherwise.
DEFAULTS = {
    "num_samples": 50_000, "class_order": "balanced", "cfg_scale": 1.0, "top_k": 0, "top_p": 1.0,
    "temperature": 1.0, "eval_size": None,
}  # fmt: skip


def make_parser() -> Parser:
    parser = Parser(__doc__, "sample")
    add = parser.add_argument
    add_model_options(parser, ZOO, "base|cca|PATH|RUN[/state/step-N][:ema]")
    add(
        "--preset", choices=("published", "published-cfg"),
        help="sampling settings behind the published figures, without or with guidance; options overrule it",
    )  # fmt: skip
    add("--num-samples", type=count(), help="images (default 50000)")
    add("--classes", default="all", metavar="all|0,7,8", help="classes to sample (default all)")
    add(
        "--class-order",
        choices=("balanced", "random"),
        help="classes in turn, or drawn uniformly (default balanced)",
    )
    add(
        "--cfg-scale",
        type=number(0),
        help="guidance scale s: uncond + s (cond - uncond); 1 is guidance-free (default 1.0)",
    )
    add(
        "--cfg-schedule",
        choices=("constant", "linear"),
        help="scale over the decoding steps (default: VAR linear, LlamaGen constant)",
    )
    add(
        "--cfg-interval",
        type=count(),
        help="guide only the first this many steps (LlamaGen: tokens, VAR: levels; default all)",
    )
    add("--top-k", type=count(0), help="keep the k likeliest tokens; 0 keeps all (default 0)")
    add(
        "--top-p",
        type=number(0, 1, above=True),
        help="keep the likeliest tokens with this much probability (default 1.0)",
    )
    add("--temperature", type=number(LOWEST_TEMPERATURE), help="divides the logits (default 1.0)")
    add(
        "--eval-size",
        type=count(),
        help="resize to this side, bicubic, before the 8-bit conversion (pixels; default: no resizing)",
    )
    add("--seed", type=count(0), default=0, help="seed of classes and tokens (default 0)")
    add(
        "--batch-size",
        type=count(),
        help="images decoded at once in a process (default: 64; on a GPU what its memory holds, 256 at most)",
    )
    add(
        "--dtype",
        choices=DTYPES,
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
    entry = zoo_entry(model)
    if device.type == "cpu":
        return "float32"
    return entry.published.dtype if entry.published else next(iter(entry.recipes.values())).dtype


def parse_classes(text: str, model: ARImageModel) -> tuple[int, ...]:
    if text == "all":
        return tuple(range(model.num_classes))
    try:
        classes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--classes: {text!r} is neither 'all' nor a list such as 0,7,8") from None
    if not all(0 <= c < model.num_classes for c in classes):
        raise UserError(f"--classes: {text} goes beyond 0 … {model.num_classes - 1}")
    return classes


def make_request(args: argparse.Namespace, model: ARImageModel, device: torch.device) -> SampleRequest:
    """What parsed options, the preset applied, ask of this model. Raises UserError."""
    schedule = args.cfg_schedule or model.default_cfg_schedule
    sampling = SamplingOptions(
        args.cfg_scale, schedule, args.cfg_interval, args.top_k, args.top_p, args.temperature
    )
    classes = parse_classes(args.classes, model)
    dtype = args.dtype or default_dtype(args.model, device)
    return SampleRequest(
        args.num_samples, classes, args.class_order, args.seed, args.eval_size, dtype, sampling
    )


def plan(
    args: argparse.Namespace,
    model: ARImageModel,
    request: SampleRequest,
    processes: Processes,
    batch_size: int,
    compile: bool,
    found: tuple[bool, int],
) -> dict[str, str]:
    """What is shown before the work, beside the model; ``found``: see ``PartStore.look``."""
    size, options = request.eval_size or model.image_size, request.sampling
    guidance = (
        "no guidance"
        if options.cfg_scale == 1
        else f"guidance {options.cfg_scale:g} ({options.cfg_schedule})"
    )
    drawn = f"temperature {options.temperature:g}, top-k {options.top_k or 'all'}, top-p {options.top_p:g}"
    classes = f"{len(request.classes)} classes {request.class_order}"
    written = f"{args.output} (~{size_text(request.num_samples * size * size * 3)})"
    finished, stored = found
    before = {}
    if finished:
        before["finished"] = f"{args.output} is there already, with these options"
    elif stored:
        before["resumes"] = f"with the {stored:,} of {request.num_samples:,} images that are stored"
    others = [str(args.output.with_suffix(".json")), *([str(args.grid)] if args.grid else [])]
    return {
        "samples": f"{request.num_samples:,} of {size} x {size} pixels, {classes}, seed {request.seed}",
        "drawing": f"{guidance}, {drawn}",
        "device": f"{processes.devices}, {request.dtype}, "
        f"batch {batch_size}, {'compiled' if compile else 'eager'}",
        "writes": ", ".join([written, *others]),
        **before,
    }


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    apply_preset(args)
    for option, path, suffix in (("--output", args.output, ".npz"), ("--grid", args.grid, ".png")):
        if path and path.suffix != suffix:
            raise UserError(f"{option}: {path} does not end in {suffix}")
        if path:
            check_output(option, path)
    processes = Processes()
    chosen = choose_weights(args.model, args.weights, args.tokenizer_weights, args.image_size)
    model = chosen.files.build()
    request = make_request(args, model, processes.device)
    compile = args.compile
    if compile is None:
        noted = open_store(model, request, args.output, {}, False).noted()
        default = compiles_by_default(model, request, processes.device, processes.world)
        compile = default if noted is None else noted["compile"] is True
    batch_size = args.batch_size or default_batch_size(model, request, processes.device)
    downloads = chosen.files.downloads(model)
    names = chosen.class_names(model)

    def show() -> None:
        found = open_store(model, request, args.output, chosen.known(), compile).look()
        rows = plan(args, model, request, processes, batch_size, compile, found)
        show_plan(chosen.plan(model) | rows, downloads)

    if not processes.planned(show, downloads, args.dry_run):
        return
    described = chosen.load(model)
    command = processes.command(args.command)
    finished = run_sampling(model, request, batch_size, args.output, described, processes, compile, command)
    if args.grid and finished and processes.main:
        with writing(args.grid):
            args.grid.parent.mkdir(parents=True, exist_ok=True)
        columns = min(len(request.classes), 10)
        samples, first = NpzImages(args.output), slice(0, min(8 * columns, args.num_samples))
        (images,), labels = samples.batches(first, first.stop), samples.labels()
        assert labels is not None
        captions = [names[label] for label in labels[first]]
        write_grid(images, args.grid, columns, captions)


if __name__ == "__main__":
    run_command(main)
