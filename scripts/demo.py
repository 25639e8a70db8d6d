"""A page to play with: base, guided base and CCA side by side, from the same random numbers.

    pip install -r requirements-demo.txt
    python -m scripts.demo --model llamagen-mini --weights runs/llamagen-mini-cca
    python -m scripts.demo --model var-d24 --weights cca        # the published ones; on a GPU

Serves http://127.0.0.1:7860 until Ctrl-C. Every picture comes with the sample.py command that makes the
same images. Without --weights: base and guided base alone.
"""

import argparse
import os
import shlex
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sample
from cca.distributed import Processes
from cca.sampling.fitting import batch_too_large, decoder_too_large, model_too_large
from cca.sampling.grid import draw_grid, side_by_side
from cca.sampling.sampler import (
    SampleRequest,
    class_of,
    decode_tokens,
    eager_generate,
    prepare,
    sample_tokens,
)
from cca.training.states import weights_of_run
from cca.training.weights import ChosenWeights, choose_weights
from models import DTYPES, ZOO, ARImageModel, UserError, zoo_entry
from models.devices import device_name, free_memory, memory_named
from models.errors import run_command
from models.files import reason
from models.options import Parser, add_model_options, count, number
from models.plan import add_dry_run_option, require_space, show_plan
from scripts.recipes import sweep

# Options of sample.py that the page asks for; the scale is the guided base's alone.
OPTIONS = (
    "--classes", "--num-samples", "--seed", "--cfg-scale", "--temperature", "--top-k", "--top-p",
)  # fmt: skip
MOST_IMAGES, MOST_PIXELS = 64, 2**22  # of a request: 28 images of 384 x 384


def make_parser() -> Parser:
    parser = Parser(__doc__, "scripts.demo")
    add = parser.add_argument
    add_model_options(parser, ZOO, "cca|PATH|RUN[/state/step-N][:ema]")
    add("--dtype", choices=DTYPES, help="precision (default float32; on a GPU the model's published one)")
    add("--max-images", type=count(), help="most images of a request (default 64, fewer of large ones)")
    add(
        "--batch-size",
        type=count(),
        default=16,
        help="images made at once, between two reports of progress (default 16)",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="address to serve; beyond this machine, all who reach it can use it",
    )
    add("--port", type=number(0, 65535, int), default=7860, help="0 takes a free one (default 7860)")
    add_dry_run_option(parser)
    return parser


@dataclass(frozen=True)
class Way:
    """A way of sampling: ``weights`` as sample.py takes them, ``sha256`` of their file (None: unknown)."""

    name: str
    title: str
    weights: str
    sha256: str | None
    model: ARImageModel
    guided: bool = False


@dataclass(frozen=True)
class Panel:
    """What one way made: uint8 images [n, H, W, 3], their picture, and the command for the same images.

    Seconds are for each image, ``token_seconds`` of them before the tokenizer's decoder.
    """

    name: str
    title: str
    images: np.ndarray
    picture: Image.Image
    seconds: float
    token_seconds: float
    command: str


@dataclass(frozen=True)
class Progress:
    """Where a request stands: images made of all that are asked for, what is being made, finished panels."""

    made: int
    total: int
    doing: str
    panels: tuple[Panel, ...]


def pinned_weights(args: argparse.Namespace) -> str:
    """--weights, but of a run the very file or state that is there now: the newest may change."""
    found = weights_of_run(args.weights, zoo_entry(args.model).backbone.checkpoint_name)
    if found is None:
        return args.weights
    path, average = found
    return f"{path}:ema" if average and path.is_dir() else str(path)


def chosen_weights(args: argparse.Namespace, weights: str) -> ChosenWeights:
    return choose_weights(args.model, weights, args.tokenizer_weights, args.image_size)


def defaults(model: str, classes: int, most_images: int) -> dict[str, str]:
    """What the page of a model starts with: the published settings, where there are some."""
    published = zoo_entry(model).published
    scale = published.cfg_scale if published else sweep(model).usual
    top_k, top_p = (published.top_k, published.top_p) if published else (0, 1.0)
    chosen, images = ("207", 9) if classes == 1000 else ("all", 20)  # golden retriever
    values = (chosen, min(images, most_images), 0, scale, 1.0, top_k, top_p)
    return {option: str(value) for option, value in zip(OPTIONS, values, strict=True)}


class Demo:
    """The models of the page, loaded and ready on ``device``. Raises UserError, as sample.py would.

    The models are used by one thread at a time.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.model_name, self.device, self.batch_size = args.model, device, args.batch_size
        self.dtype = args.dtype or sample.default_dtype(args.model, device)
        self.common = {
            "--model": args.model, "--tokenizer-weights": args.tokenizer_weights,
            "--image-size": args.image_size, "--dtype": self.dtype,
        }  # fmt: skip
        weights = pinned_weights(args)
        base = self._way("base", "Base, no guidance", "base")
        self.model = base.model
        guided = Way("guided", "Base, guidance", "base", base.sha256, base.model, guided=True)
        tuned = [] if weights == "base" else [self._way("cca", "CCA, no guidance", weights)]
        self.ways = [base, guided, *tuned]
        fitting = MOST_PIXELS // base.model.image_size**2
        self.most_images = args.max_images or max(1, min(MOST_IMAGES, fitting))
        self.class_names = chosen_weights(args, weights).class_names(self.model)
        self.defaults = defaults(args.model, self.model.num_classes, self.most_images)

    def _way(self, name: str, title: str, weights: str) -> Way:
        args = self._parsed({"--weights": weights})
        chosen = chosen_weights(args, weights)
        model = chosen.files.build()
        described = chosen.load(model)
        request, free = sample.make_request(args, model, self.device), free_memory(self.device)
        with memory_named(model_too_large(self.model_name, model, request, free)):
            prepare(model, self.dtype, self.device)
        return Way(name, title, weights, described["weights_sha256"], model)

    def sample(self, options: Mapping[str, str]) -> Iterator[Progress]:
        """Make the panels of a request, a batch of images at each step; the last step has all panels.

        options: a text for each of ``OPTIONS``, as sample.py takes it.

        Raises:
            UserError: a value is wrong, or too many images are asked for (before anything is made);
                logits are not finite; the memory does not suffice.
        """
        plans = [(way, *self._plan(way, options)) for way in self.ways]
        panels: tuple[Panel, ...] = ()
        free = free_memory(self.device)
        for way, request, command in plans:
            n, tokens, seconds = request.num_samples, [], 0.0
            title = f"{way.title} {request.sampling.cfg_scale:g}" if way.guided else way.title
            generate = eager_generate(way.model, request)
            for start in range(0, n, self.batch_size):
                yield Progress(len(panels) * n + start, len(plans) * n, title, panels)
                began, batch = time.perf_counter(), range(start, min(start + self.batch_size, n))
                too_many = batch_too_large(self.model_name, way.model, request, len(batch), free)
                with memory_named(too_many):
                    tokens.append(sample_tokens(way.model, batch, request, self.device, generate))
                seconds += time.perf_counter() - began
            began = time.perf_counter()
            with memory_named(decoder_too_large(self.model_name, free)):
                images = decode_tokens(way.model, torch.cat(tokens), request).numpy()
            whole = seconds + time.perf_counter() - began
            picture = self._picture(images, request)
            panels += (Panel(way.name, title, images, picture, whole / n, seconds / n, command),)
        yield Progress(len(plans) * n, len(plans) * n, "", panels)

    def _plan(self, way: Way, options: Mapping[str, str]) -> tuple[SampleRequest, str]:
        """What sample.py makes of a request for this way, and its command."""
        if sorted(options) != sorted(OPTIONS):
            raise UserError(f"wanted are {', '.join(OPTIONS)}")
        own = {k: v.strip() for k, v in options.items() if way.guided or k != "--cfg-scale"}
        own = {"--weights": way.weights, **own}
        args = self._parsed(own)
        if args.num_samples > self.most_images:
            raise UserError(f"--num-samples: {args.num_samples} must be at most {self.most_images} here")
        request = sample.make_request(args, way.model, self.device)
        # Said is what is not so without being said.
        said = {k: v for k, v in own.items() if getattr(args, _name(k)) != sample.DEFAULTS.get(_name(k))}
        words = [word for pair in self._complete(said).items() for word in pair]
        return request, f"python sample.py {shlex.join([*words, '--output', f'{way.name}.npz'])}"

    def _complete(self, options: Mapping[str, str]) -> dict[str, str]:
        common = {name: str(value) for name, value in self.common.items() if value is not None}
        return {"--model": common.pop("--model"), **options, **common}

    def _parsed(self, options: Mapping[str, str]) -> argparse.Namespace:
        """By sample.py's own parser, whatever the values look like."""
        words = [f"{name}={value}" for name, value in self._complete(options).items()]
        args = sample.make_parser().parse_args([*words, "--output=unused.npz"])
        sample.apply_preset(args)
        return args

    def _picture(self, images: np.ndarray, request: SampleRequest) -> Image.Image:
        labels = [class_of(i, request) for i in range(len(images))]
        captions = [self.class_names[label] for label in labels]
        several = 1 < len(request.classes) <= 6
        columns = len(request.classes) if several else int(np.ceil(np.sqrt(len(images))))
        return draw_grid(images, columns, captions)


def _name(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def comparison(panels: tuple[Panel, ...]) -> Image.Image:
    """One picture of all panels."""
    return side_by_side([(panel.title, panel.picture) for panel in panels])


def commands(panels: tuple[Panel, ...]) -> str:
    """The commands of all panels, a line each."""
    return "".join(f"{panel.command}\n" for panel in panels)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that takes connections at that address. Raises UserError where it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = socket.create_server(address[:2], family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host, --port: {host}:{port} cannot be served ({reason(error)})") from None
    with server:
        yield server


def show(args: argparse.Namespace, processes: Processes) -> None:
    """Print what will be loaded and served. Raises UserError where there is no room for downloads."""
    given = dict.fromkeys(("base", pinned_weights(args)))
    chosen = [chosen_weights(args, weights) for weights in given]
    model = chosen[0].files.build()
    rows = chosen[0].plan(model)
    for tuned in chosen[1:]:
        rows["CCA"] = tuned.plan(model)["weights"]
    dtype = args.dtype or sample.default_dtype(args.model, processes.device)
    rows["device"] = f"{device_name(processes.device)}, {dtype}, batch {args.batch_size}"
    rows["serves"] = f"http://{args.host}:{args.port}"
    downloads = list(dict.fromkeys(file for each in chosen for file in each.files.downloads(model)))
    show_plan(rows, downloads)
    if not args.dry_run:
        require_space(downloads)


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    processes = Processes()
    if processes.world > 1:
        raise UserError("WORLD_SIZE: the page is served by one process; start it without torchrun")
    show(args, processes)
    if args.dry_run:
        return
    with tempfile.TemporaryDirectory(prefix="cca-demo-") as folder:
        # Read when Gradio is imported: its files lie there, and it reports to nobody.
        os.environ |= {
            "GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False",
        }  # fmt: skip
        try:
            from scripts import demo_page
        except ModuleNotFoundError as error:
            if error.name not in ("gradio", "uvicorn", "fastapi"):
                raise
            raise UserError("the page needs Gradio: pip install -r requirements-demo.txt") from None
        with listening(args.host, args.port) as server:
            demo_page.serve(Demo(args, processes.device), server, Path(folder))


if __name__ == "__main__":
    run_command(main)
