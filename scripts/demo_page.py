"""The page of scripts/demo.py, in Gradio, and its server."""

import shutil
import signal
import socket
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from html import escape
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI

from cca.sampling.grid import write_png
from models import UserError
from models.devices import device_name
from models.errors import one_line
from models.files import atomic_write
from scripts.demo import OPTIONS, Demo, Panel, Progress, commands, comparison

OLDEST = (6, 31)  # tried with it; the pages of 6.0 ask servers elsewhere
if tuple(map(int, gr.__version__.split(".")[:2])) < OLDEST:
    raise UserError(
        f"the page needs Gradio {'.'.join(map(str, OLDEST))} or newer, not {gr.__version__}: "
        "pip install -r requirements-demo.txt"
    )

LABELS = dict(
    zip(
        OPTIONS,
        ("Classes", "Images", "Seed", "Guidance scale", "Temperature", "Top-k", "Top-p"),
        strict=True,
    )
)
WAITING = 32  # requests in the queue, beyond which more are refused
KEPT = 64  # requests whose files can be downloaded still
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#facts { font-size: 0.85em; opacity: 0.75; overflow-wrap: anywhere; }
#status { min-height: 2.4em; padding: 0; }
#status .message { color: #b91c1c; font-weight: 600; }
.panel h3, .panel p { margin: 0 !important; }
.panel p { font-size: 0.9em; opacity: 0.75; }
.panel .image-container { min-height: 300px; }
footer { display: none !important; }
"""
ABOUT = """
The same classes and the same random numbers, sampled in up to three ways: from the pretrained <b>base</b>;
from the base with classifier-free <b>guidance</b>, two passes for every token; and from the base fine-tuned
with <b>Condition Contrastive Alignment</b> (CCA), which does without guidance, in one.
"""


class Worker:
    """One thread in which all sampling is done, whichever threads ask for it."""

    def __init__(self):
        self.thread = ThreadPoolExecutor(1)

    def steps(self, steps: Iterator[Progress]) -> Iterator[Progress]:
        """The same steps, each made there; what is asked for by several is made in turn."""
        while (step := self.thread.submit(next, steps, None).result()) is not None:
            yield step


class Files:
    """What can be downloaded: a folder for each request, the oldest removed."""

    def __init__(self, folder: Path):
        self.folder, self.kept = folder, deque[Path]()

    def new(self) -> Path:
        self.kept.append(Path(tempfile.mkdtemp(dir=self.folder)))
        if len(self.kept) > KEPT:
            shutil.rmtree(self.kept.popleft(), ignore_errors=True)
        return self.kept[-1]


def heading(demo: Demo) -> str:
    """What is shown, and of which weights."""
    size = demo.model.image_size
    facts = [demo.model_name, f"{size} × {size} pixels", f"{device_name(demo.device)}, {demo.dtype}"]
    for way in demo.ways:
        if not way.guided:
            digest = f", SHA-256 {way.sha256[:12]}…" if way.sha256 else ""
            facts.append(f"{way.title.partition(',')[0]}: {way.weights}{digest}")
    return (
        f"<h1>Guidance-free sampling, side by side</h1><p>{ABOUT}</p>"
        f"<p id='facts'>{' &nbsp;·&nbsp; '.join(escape(fact) for fact in facts)}</p>"
    )


def texts(values: tuple) -> dict[str, str]:
    """The widgets' values as the texts of ``Demo.sample``; they come from a browser, and are not checked."""
    classes, *others = values
    chosen = ",".join(map(str, classes)) if isinstance(classes, list) else str(classes or "")
    return dict(zip(OPTIONS, [chosen or "all", *("" if v is None else str(v) for v in others)], strict=True))


def caption(title: str, panel: Panel | None = None) -> str:
    time = f"{panel.seconds:.3g} s per image (tokens {panel.token_seconds:.3g} s)" if panel else "&nbsp;"
    return f"<h3>{escape(title)}</h3><p>{time}</p>"


def on_page(error: UserError) -> str:
    """The message, with the page's names of options."""
    option, colon, rest = one_line(error).partition(":")
    return f"{LABELS.get(option, option)}{colon}{rest}"


def page(demo: Demo, worker: Worker, files: Files) -> gr.Blocks:
    start = demo.defaults
    with gr.Blocks(title=f"CCA · {demo.model_name}", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(heading(demo))
        with gr.Row(equal_height=True):
            names = [(f"{name} ({label})", label) for label, name in enumerate(demo.class_names)]
            chosen = [] if start["--classes"] == "all" else [int(start["--classes"])]
            classes = gr.Dropdown(
                names, value=chosen, multiselect=True, scale=3, elem_id="classes",
                label=f"{LABELS['--classes']}, in turn: type to search; none: all",
            )  # fmt: skip
            images = _slider("--num-samples", start, 1, demo.most_images, 1)
            seed = gr.Textbox(start["--seed"], label=LABELS["--seed"], elem_id="seed", max_lines=1)
        with gr.Row(equal_height=True):
            others = [
                _slider("--cfg-scale", start, 0, 10, 0.05),
                _slider("--temperature", start, 0.05, 2, 0.05),
                _slider("--top-k", start, 0, demo.model.vocab_size, 1),
                _slider("--top-p", start, 0.01, 1, 0.01),
            ]
        button = gr.Button("Sample", variant="primary", elem_id="sample")
        status = gr.HTML("", elem_id="status")
        pictures, captions = [], []
        with gr.Row():
            for way in demo.ways:
                with gr.Column(elem_classes="panel", min_width=240):
                    captions.append(gr.HTML(caption(way.title), elem_id=f"caption-{way.name}"))
                    pictures.append(
                        gr.Image(
                            label=way.title,
                            show_label=False,
                            interactive=False,
                            type="filepath",
                            format="png",
                            elem_id=f"picture-{way.name}",
                            buttons=["fullscreen"],
                        )
                    )
        with gr.Row():
            loads = [
                gr.DownloadButton("Download the picture", interactive=False, elem_id="get-picture"),
                gr.DownloadButton("Download the commands", interactive=False, elem_id="get-commands"),
            ]
        text = gr.Code(
            label="The same images with sample.py, from the project's folder", language="shell", lines=3,
            interactive=False, max_lines=4, show_line_numbers=False, elem_id="commands",
        )  # fmt: skip

        def run(*values, progress=gr.Progress()):
            """After each step what the outputs show; a new picture as soon as it is finished."""
            paths: dict[str, str | None] = {way.name: None for way in demo.ways}
            folder: Path | None = None
            unready = [gr.DownloadButton(interactive=False) for _ in loads]
            try:
                for step in worker.steps(demo.sample(texts(values))):
                    folder = folder or files.new()
                    for panel in step.panels:
                        if not paths[panel.name]:
                            paths[panel.name] = f"{folder}/{panel.name}.png"
                            write_png(panel.picture, folder / f"{panel.name}.png")
                    notes = [caption(panel.title, panel) for panel in step.panels]
                    notes += [caption(way.title) for way in demo.ways[len(notes) :]]
                    if step.doing:
                        progress((step.made, step.total), desc=step.doing, unit="images")
                        yield [step.doing, *paths.values(), *notes, *unready, ""]
                        continue
                    write_png(comparison(step.panels), folder / "comparison.png")
                    lines = commands(step.panels)
                    atomic_write(folder / "commands.sh", partial(Path.write_text, data=lines))
                    ready = [
                        gr.DownloadButton(value=folder / name, interactive=True)
                        for name in ("comparison.png", "commands.sh")
                    ]
                    yield ["", *paths.values(), *notes, *ready, lines]
            except UserError as error:
                unchanged = [gr.skip() for _ in outputs[1:]]
                yield [f"<p class='message' role='alert'>{escape(on_page(error))}</p>", *unchanged]

        outputs = [status, *pictures, *captions, *loads, text]
        # Values are checked by sample.py's parser, not by the widgets as well.
        gr.on(
            [button.click, seed.submit], run, [classes, images, seed, *others], outputs, concurrency_limit=1,
            preprocess=False, show_progress="full", show_progress_on=status, api_visibility="private",
        )  # fmt: skip
    return blocks.queue(max_size=WAITING)


def _slider(option: str, start: dict[str, str], low: float, high: float, step: float) -> gr.Slider:
    return gr.Slider(
        low, high, float(start[option]), step=step, label=LABELS[option], elem_id=option.removeprefix("--")
    )


def serve(demo: Demo, server: socket.socket, folder: Path) -> None:
    """Serve the page on a listening socket until a signal ends it; its files lie in ``folder``.

    Raises UserError where the models cannot sample.
    """
    worker = Worker()
    for _ in worker.steps(demo.sample({**demo.defaults, "--num-samples": "1"})):
        pass  # the first images take longer than others
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    app = gr.mount_gradio_app(
        FastAPI(), page(demo, worker, Files(folder)), "/", show_error=False, ssr_mode=False, theme=theme,
        css=CSS, footer_links=[],
    )  # fmt: skip
    host, port = server.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[server])
