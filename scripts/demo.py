"""A web page that samples from base, guided base and CCA side by side, with the same random numbers.

    pip install -r requirements-demo.txt
    python -m scripts.demo --model llamagen-mini --weights runs/quickstart/llamagen-mini-cca
    python -m scripts.demo --model var-d24 --weights cca        # published weights, on a GPU

Serves http://127.0.0.1:7860 until Ctrl-C. Below its pictures the page shows the sample.py commands that make
the same images. Without --weights the page shows only base and guided base.
"""

import argparse
import os
import shlex
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from html import escape

import numpy as np
import torch
from PIL import Image

import sample
from cca.cli.main import OnePart, play, run_command
from cca.cli.output import OutputStatus
from cca.cli.parser import Parser, add_model_options, count, number
from cca.cli.plan import add_dry_run_option
from cca.config import SampleRequest
from cca.data.labels import class_names
from cca.distributed import Ranks, device_name
from cca.sampling.grid import draw_grid, side_by_side
from cca.sampling.sampler import Sampler, class_of, prepare
from models import DTYPES, ZOO, ARImageModel, UserError, zoo_entry
from models.utils.errors import one_line
from models.utils.files import reason
from models.zoo.loading import ModelFiles, find_files
from scripts.recipes import sweep

WAYS = {"base": "Base, no guidance", "guided": "Base, guidance {}", "cca": "CCA, no guidance"}
# Options of sample.py that the page offers, and their labels on the page. The guided base uses the scale.
LABELS = {
    "--classes": "Classes", "--seed": "Seed", "--num-samples": "Images", "--cfg-scale": "Guidance",
    "--temperature": "Temperature", "--top-k": "Top-k", "--top-p": "Top-p",
}  # fmt: skip
MOST_IMAGES, MOST_PIXELS = 64, 2**22  # per request and panel; 2**22 pixels are 28 images of 384 x 384
OLDEST_GRADIO = (6, 31)  # the version tested; pages of 6.0 contact other servers
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#facts { font-size: 0.85em; opacity: 0.75; overflow-wrap: anywhere; }
#status { min-height: 2.4em; padding: 0; }
#status .error { color: #b91c1c; font-weight: 600; }
.picture { min-height: 300px; }
.picture label { position: static; }
#commands .empty { min-height: 5em; }
footer { display: none !important; }
"""
ABOUT = """
The page samples the same classes with the same random numbers in up to three ways: from the pretrained
<b>base</b>; from the base with classifier-free <b>guidance</b>, which takes two forward passes per token; and
from the base fine-tuned with <b>Condition Contrastive Alignment</b> (CCA), which needs no guidance and takes
one pass.
"""


def make_parser() -> Parser:
    parser = Parser(__doc__, "scripts.demo")
    add_model_options(parser, ZOO, "cca|PATH|RUN[/state/step-N][:ema]|hf://ORG/REPO/FILE")

    add = parser.group("performance").add_argument
    add(
        "--dtype",
        choices=DTYPES,
        help="precision of the transformer (default: on a GPU the model's published one, on a CPU float32)",
    )
    add(
        "--batch-size",
        type=count(),
        default=16,
        help="images per batch; the page shows its progress after each batch (default: 16)",
    )

    add = parser.group("output").add_argument
    add(
        "--max-images",
        type=count(),
        help="largest number of images per request and panel (default: 64, fewer for large images)",
    )
    add("--host", default="127.0.0.1", help="address to serve; there is no password (default: 127.0.0.1)")
    add("--port", type=number(0, 65535, int), default=7860, help="port; 0 is any free port (default: 7860)")
    add_dry_run_option(parser)
    return parser


@dataclass(frozen=True)
class Panel:
    """One way of sampling: its model and request, and the sample.py command that makes the same images."""

    title: str
    model: ARImageModel
    request: SampleRequest
    command: str


def files_by_weights(args: argparse.Namespace) -> dict[str, ModelFiles]:
    """Return the files of the base, then of the fine-tuned model, by the --weights that sample.py takes.

    For a run, --weights names the file or checkpoint that is its newest now, since the newest may change.
    """
    tuned = find_files(args.model, args.weights, args.tokenizer_weights, args.image_size)
    tokenizer = args.tokenizer_weights or tuned.config.get("tokenizer")
    base = find_files(args.model, "base", tokenizer, tuned.image_size)
    file = tuned.transformer_file
    return {"base": base, args.weights if file is None or file.published else file.name: tuned}


def defaults(model: str, classes: int, most_images: int) -> dict[str, str]:
    """Return the first values on a model's page: the published settings, if there are some."""
    published = zoo_entry(model).published
    filters = (published.top_k, published.top_p) if published else (0, 1.0)
    scale = published.cfg_scale if published else sweep(model).usual
    chosen, images = ("207", 9) if classes == 1000 else ("all", 20)  # golden retriever
    values = (chosen, 0, min(images, most_images), scale, 1.0, *filters)
    return dict(zip(LABELS, map(str, values), strict=True))


class Demo:
    """The models of the page, loaded on ``device``. One request at a time may use them.

    Raises UserError, as sample.py does.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.dtype = args.dtype or sample.default_dtype(args.model, device)
        self.models = {}
        for weights, files in files_by_weights(args).items():
            self.models[weights] = model = files.build()
            files.load_into(model)
            prepare(model, self.dtype, device)
        self.model = self.models["base"]
        # ``files`` is now the last entry, the fine-tuned model if there is one.
        self.class_names = class_names(files.config.get("data"), self.model.num_classes)
        self.weights = dict(zip(WAYS, ["base", *self.models]))
        self.most_images = args.max_images or min(MOST_IMAGES, MOST_PIXELS // self.model.image_size**2)
        self.defaults = defaults(args.model, self.model.num_classes, self.most_images)

    def _request(self, model: ARImageModel, options: Mapping[str, str]) -> SampleRequest:
        """Return the request that sample.py makes of these options. Raises UserError."""
        # As --option=value, so that a value that begins with a dash is no option.
        words = [f"{name}={value}" for name, value in options.items()]
        args = sample.make_parser().parse_args([*words, "--output=unused.npz"])
        sample.apply_preset(args)
        return sample.make_request(args, model, self.device)

    def plan(self, options: Mapping[str, str]) -> list[Panel]:
        """Check a request, and return a panel for each way of sampling.

        options: the text of each option in ``LABELS``, as sample.py takes it.

        Raises:
            UserError: a value is wrong, or the request is for too many images.
        """
        args, panels = self.args, []
        for name, weights in self.weights.items():
            options_of_panel = {
                "--model": args.model, "--tokenizer-weights": args.tokenizer_weights,
                "--image-size": args.image_size, "--dtype": self.dtype, "--weights": weights, **options,
                "--cfg-scale": options["--cfg-scale"] if name == "guided" else None,
            }  # fmt: skip
            own = {option: str(value) for option, value in options_of_panel.items() if value is not None}
            request = self._request(self.models[weights], own)
            if request.num_samples > self.most_images:
                raise UserError(
                    f"--num-samples: {request.num_samples} must be at most {self.most_images} here"
                )
            words = [word for pair in own.items() for word in pair]
            command = f"python sample.py {shlex.join([*words, '--output', f'{name}.npz'])}"
            panels.append(
                Panel(WAYS[name].format(options["--cfg-scale"]), self.models[weights], request, command)
            )
        return panels

    def sample(self, panel: Panel) -> Iterator[list[np.ndarray]]:
        """Yield after each batch the panel's images so far, uint8 [H, W, 3]; at the end all of them.

        Raises UserError if logits are not finite, or if memory runs out.
        """
        count, size, images = panel.request.num_samples, self.args.batch_size, []
        batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
        for piece in Sampler(panel.model, panel.request, size, self.device).images(batches):
            images.extend(piece)
            if len(piece):
                yield images

    def picture(self, images: list[np.ndarray], request: SampleRequest) -> Image.Image:
        """Return the images in a grid, with the names of their classes."""
        classes = [class_of(i, request) for i in range(len(images))]
        count = len(request.classes)
        columns = count if 1 < count <= 6 else int(np.ceil(np.sqrt(len(images))))
        return draw_grid(np.stack(images), columns, [self.class_names[c] for c in classes], classes)


def heading(demo: Demo) -> str:
    """Return the top of the page as HTML: what it does, model, device and weights."""
    facts = [
        demo.args.model, f"{demo.model.image_size} × {demo.model.image_size} pixels",
        f"{device_name(demo.device)}, {demo.dtype}", f"weights: {' and '.join(demo.models)}",
    ]  # fmt: skip
    return (
        f"<h1>Guidance-free sampling, side by side</h1><p>{ABOUT}</p>"
        f"<p id='facts'>{' &nbsp;·&nbsp; '.join(escape(fact) for fact in facts)}</p>"
    )


def option_text(value) -> str:
    """Return a widget's value as text for sample.py. The value comes from a browser, unchecked."""
    if isinstance(value, list):
        return ",".join(map(str, value)) or "all"
    return "" if value is None else str(value).strip()


def message_for_page(error: UserError) -> str:
    """Return the error's message as HTML, in which the option has its label on the page."""
    option, colon, rest = one_line(error).partition(":")
    return f"<p class='error' role='alert'>{escape(LABELS.get(option, option) + colon + rest)}</p>"


def import_gradio():
    """Return the module gradio. Raises UserError if it is not installed or too old."""
    try:
        import gradio
    except ModuleNotFoundError:
        raise UserError("the page needs Gradio: pip install -r requirements-demo.txt") from None
    if tuple(map(int, gradio.__version__.split(".")[:2])) < OLDEST_GRADIO:
        raise UserError(
            f"the page needs Gradio {'.'.join(map(str, OLDEST_GRADIO))} or newer, not {gradio.__version__}: "
            "pip install -r requirements-demo.txt"
        )
    return gradio


def option_widgets(gr, demo: Demo) -> list:
    """Return the widgets of the options, in the order of ``LABELS``."""
    start = demo.defaults
    ranges = {  # lowest, highest, step
        "--num-samples": (1, demo.most_images, 1), "--cfg-scale": (0, 10, 0.05),
        "--temperature": (0.05, 2, 0.05), "--top-k": (0, demo.model.vocab_size, 1),
        "--top-p": (0.01, 1, 0.01),
    }  # fmt: skip
    with gr.Row(equal_height=True):
        classes = gr.Dropdown(
            [(f"{name} ({label})", label) for label, name in enumerate(demo.class_names)],
            value=[] if start["--classes"] == "all" else [int(start["--classes"])],
            label=f"{LABELS['--classes']}, in turn: type to search; none: all",
            multiselect=True, scale=3, elem_id="classes",
        )  # fmt: skip
        seed = gr.Textbox(start["--seed"], label=LABELS["--seed"], elem_id="seed", max_lines=1)
    with gr.Row(equal_height=True):
        sliders = [
            gr.Slider(low, high, float(start[name]), step=step, label=LABELS[name], elem_id=name[2:])
            for name, (low, high, step) in ranges.items()
        ]
    return [classes, seed, *sliders]


def make_handler(gr, demo: Demo, folder: str, outputs: list):
    """Return the handler of the button: it takes the options' values and yields updates of the page."""
    status, *pictures, download, commands = outputs

    def run(*values, progress=gr.Progress()):
        titled: list[tuple[str, Image.Image]] = []
        try:
            panels = demo.plan({option: option_text(value) for option, value in zip(LABELS, values)})
            empty = {picture: gr.Image(None, label=panel.title) for picture, panel in zip(pictures, panels)}
            yield {**empty, status: "", download: gr.DownloadButton(interactive=False), commands: ""}
            for picture, panel in zip(pictures, panels):
                start = time.perf_counter()
                for images in demo.sample(panel):
                    progress((len(images), panel.request.num_samples), desc=panel.title, unit="images")
                    yield {status: ""}  # raises if the browser has left
                seconds = (time.perf_counter() - start) / len(images)
                titled.append((panel.title, demo.picture(images, panel.request)))
                yield {picture: gr.Image(titled[-1][1], label=f"{panel.title} · {seconds:.3g} s per image")}
        except UserError as error:
            yield {status: message_for_page(error)}
            return
        side_by_side(titled).save(f"{folder}/comparison.png")
        yield {
            download: gr.DownloadButton(value=f"{folder}/comparison.png", interactive=True),
            commands: "".join(f"{panel.command}\n" for panel in panels),
        }

    return run


def make_page(gr, demo: Demo, folder: str):
    """Return the page, a gradio.Blocks. Files for download are written to ``folder``."""
    with gr.Blocks(
        title=f"CCA · {demo.args.model}", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
    ) as page:
        gr.HTML(heading(demo))
        options = option_widgets(gr, demo)
        button = gr.Button("Sample", variant="primary", elem_id="sample")
        status = gr.HTML("", elem_id="status")
        with gr.Row():
            pictures = [
                gr.Image(
                    label=panel.title, interactive=False, format="png", buttons=["fullscreen"], min_width=240,
                    elem_id=name, elem_classes="picture",
                )
                for name, panel in zip(demo.weights, demo.plan(demo.defaults))
            ]  # fmt: skip
        outputs = [
            status,
            *pictures,
            gr.DownloadButton("Download the picture", interactive=False, elem_id="download"),
            gr.Code(
                label="The same images with sample.py, from the project's folder", language="shell", lines=3,
                interactive=False, max_lines=8, wrap_lines=True, show_line_numbers=False, elem_id="commands",
            ),
        ]  # fmt: skip
        # Without preprocess: the parser of sample.py checks the values, and the widgets need not.
        gr.on(
            [button.click, options[1].submit], make_handler(gr, demo, folder, outputs), options, outputs,
            concurrency_limit=1, preprocess=False, show_progress_on=status, api_name="sample",
        )  # fmt: skip
    return page.queue(max_size=32, api_open=False)


def serve(page, theme, host: str, port: int) -> None:
    """Serve a page until SIGINT or SIGTERM."""
    os.environ["no_proxy"] = "*"  # Gradio checks that its own server answers, which a proxy would prevent
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        _, url, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host, server_port=port, prevent_thread_lock=True,
            quiet=True, share=False, ssr_mode=False, run_history=False, footer_links=[], theme=theme, css=CSS,
        )  # fmt: skip
        print(f"{url} (Ctrl-C ends it)", flush=True)
        signal.pause()
    page.close(verbose=False)


def free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0. Raises UserError if the address cannot be served."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as server:
            return server.getsockname()[1]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host, --port: {host}:{port} cannot be served ({reason(error)})") from None


def resolve(args: argparse.Namespace, ranks: Ranks, status: OutputStatus) -> OnePart:
    """Find the weights, and return the job that serves the page. Raises UserError."""
    if ranks.world_size > 1:
        raise UserError("WORLD_SIZE: only one rank can serve the page; start it without torchrun")
    base, *tuned = files_by_weights(args).values()
    model = base.build()
    dtype = args.dtype or sample.default_dtype(args.model, ranks.device)
    rows = {
        **base.plan(model), **({"CCA": tuned[0].plan(model)["weights"]} if tuned else {}),
        "device": f"{device_name(ranks.device)}, {dtype}, batch {args.batch_size}",
        "serves": f"http://{args.host}:{args.port}",
    }  # fmt: skip
    downloads = list(dict.fromkeys(file for files in (base, *tuned) for file in files.downloads(model)))
    return OnePart(ranks, rows, partial(load_and_serve, args, ranks.device), downloads)


def load_and_serve(args: argparse.Namespace, device: torch.device) -> None:
    """Load the models, and serve the page until SIGINT or SIGTERM. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="cca-demo-") as folder:
        # Gradio reads these variables when it is imported: the folder of its files, and no analytics.
        os.environ |= {"GRADIO_TEMP_DIR": f"{folder}/served", "GRADIO_ANALYTICS_ENABLED": "False"}
        gr = import_gradio()
        port = free_port(args.host, args.port)
        demo = Demo(args, device)
        for panel in demo.plan({**demo.defaults, "--num-samples": "1"}):
            list(
                demo.sample(panel)
            )  # a model's first images take longer, so they are sampled before the first request
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        serve(make_page(gr, demo, folder), theme, args.host, port)


def main(argv: list[str] | None = None) -> None:
    play(make_parser().parse_args(argv), None, resolve)


if __name__ == "__main__":
    run_command(main)
