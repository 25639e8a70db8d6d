"""The demo page: its images against those of sample.py, its errors, and requests to a served page."""

import re
import shlex
import signal
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from commands import ROOT, command_line, environment
from limits import memory_full
from PIL import Image

import sample
from cca.cli.main import run_command
from cca.sampling import sampler
from cca.sampling.grid import draw_grid
from models import ZOO, UserError, load_model, zoo_entry
from models.zoo.checkpoint_formats import save_published
from models.zoo.registry import FASHION_CLASSES
from scripts import demo

MODEL = "llamagen-mini"
OPTIONS = {
    "--classes": "3,7", "--seed": "11", "--num-samples": "5", "--cfg-scale": "2.5", "--temperature": "0.9",
    "--top-k": "50", "--top-p": "0.95",
}  # fmt: skip


def make_demo(*arguments):
    return demo.Demo(demo.make_parser().parse_args(["--model", MODEL, *arguments]), torch.device("cpu"))


@pytest.fixture(scope="module")
def fine_tuned_file(tmp_path_factory):
    """Write weights that differ from the base, and return their path, which contains HTML."""
    path = tmp_path_factory.mktemp("demo") / "<b>a run" / "model.pt"
    path.parent.mkdir()
    generator = torch.Generator().manual_seed(1)
    state = load_model(MODEL).transformer.state_dict()
    moved = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
    save_published(moved, path, "model")
    return path


@pytest.fixture(scope="module")
def three_panels(fine_tuned_file):
    return make_demo("--weights", str(fine_tuned_file.parent), "--batch-size", "2")


def run_sample(line):
    """Run a sample.py command, and return the images and classes of its file."""
    python, file, *arguments = shlex.split(line)
    assert (python, file) == ("python", "sample.py")
    sample.main(arguments)
    with np.load(arguments[-1]) as samples:
        return samples["arr_0"], samples["arr_1"].tolist()


def test_commands_reproduce_the_pixels(three_panels, fine_tuned_file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    panels, pixels = three_panels.plan(OPTIONS), []
    assert [panel.title for panel in panels] == [
        "Base, no guidance", "Base, guidance 2.5", "CCA, no guidance",
    ]  # fmt: skip
    for panel in panels:
        sizes = []
        for images in three_panels.sample(panel):
            sizes.append(len(images))
        assert sizes == [2, 4, 5]  # each batch adds its images
        expected, classes = run_sample(panel.command)
        assert np.array_equal(expected, np.stack(images)) and classes == [3, 7, 3, 7, 3]
        pixels.append(expected)
    first, *others = pixels
    assert all((images != first).any() for images in others)
    assert f"--weights '{fine_tuned_file}'" in panels[2].command
    assert "--cfg-scale" not in panels[0].command + panels[2].command


def test_no_weights_and_fewer_images():
    few = make_demo("--max-images", "5")
    assert [panel.title for panel in few.plan(OPTIONS)] == ["Base, no guidance", "Base, guidance 2.5"]
    with pytest.raises(UserError, match="^--num-samples: 6 must be at most 5 here"):
        few.plan({**OPTIONS, "--num-samples": "6"})
    assert few.defaults["--num-samples"] == "5"


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--seed", "-1", "--seed: -1 must be at least 0"),
        ("--seed", f"{2**63}", "--seed: 9223372036854775808 must be at least 0 and at most"),
        ("--seed", "--output=x.npz", "--seed: '--output=x.npz' is not an integer"),
        ("--num-samples", "0", "--num-samples: 0 must be at least 1"),
        ("--num-samples", "65", "--num-samples: 65 must be at most 64 here"),
        ("--num-samples", "2.5", "--num-samples: '2.5' is not an integer"),
        ("--classes", "3,10", "--classes: 3,10; expected"),
        ("--classes", "Coat", "--classes: 'Coat' is neither 'all' nor a list"),
        ("--cfg-scale", "", "--cfg-scale: '' is not a number"),
        ("--cfg-scale", "nan", "--cfg-scale: nan must be at least 0 and finite"),
        ("--temperature", "0", "--temperature: 0 must be at least 1e-06"),
        ("--top-k", "many", "--top-k: 'many' is not an integer"),
        ("--top-p", "1.5", "--top-p: 1.5 must be above 0 and at most 1"),
    ],
)
def test_invalid_values_raise(three_panels, option, value, message):
    with pytest.raises(UserError) as caught:
        three_panels.plan({**OPTIONS, option: value})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "place, message",
    [
        ("generate_tokens", "--batch-size: 2 images at once do not fit in GPU memory"),
        ("to_pixels", "--model: decoding does not fit in GPU memory"),
    ],
)
def test_oom_ends_only_the_request(place, message, three_panels, monkeypatch):
    panel = three_panels.plan(OPTIONS)[2]
    with monkeypatch.context() as patch:
        patch.setattr(sampler, place, memory_full)
        with pytest.raises(UserError) as caught:
            list(three_panels.sample(panel))
    assert str(caught.value).startswith(message)
    *_, images = three_panels.sample(panel)
    assert len(images) == 5


@pytest.mark.parametrize("model", sorted(ZOO))
def test_defaults_are_valid_options(model):
    classes = zoo_entry(model).transformer.num_classes
    start = demo.defaults(model, classes, 16)
    arguments = [word for pair in start.items() for word in pair]
    args = sample.make_parser().parse_args(["--model", model, "--output", "x.npz", *arguments])
    assert args.cfg_scale > 1 and args.num_samples <= 16
    if args.classes != "all":
        assert int(args.classes) < classes


def test_weights_name_the_newest_checkpoint(tmp_path):
    def resolve_weights(weights):
        args = demo.make_parser().parse_args(["--model", MODEL, "--weights", weights])
        return list(demo.files_by_weights(args))[-1]

    for step in (3, 12):
        (tmp_path / "state" / f"step-{step}").mkdir(parents=True)
    assert resolve_weights(f"{tmp_path}") == f"{tmp_path}/state/step-12"
    assert resolve_weights(f"{tmp_path}:ema") == f"{tmp_path}/state/step-12:ema"
    (tmp_path / "model_ema.pt").touch()
    assert resolve_weights(f"{tmp_path}:ema") == f"{tmp_path}/model_ema.pt"
    assert resolve_weights("base") == "base"


@pytest.fixture
def error_line(monkeypatch, capsys, tmp_path):
    """Return a function that runs a command, which must fail, and returns its only line on stderr.

    The command must leave no file. A fake module stands in for Gradio.
    """
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    newest = types.SimpleNamespace(__version__="99.0.0")

    def run(*arguments, gradio=newest):
        monkeypatch.setitem(sys.modules, "gradio", gradio)
        with pytest.raises(SystemExit) as caught:
            run_command(lambda: demo.main(["--model", MODEL, *arguments]))
        (line,) = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2 and not list(tmp_path.iterdir())
        return line

    return run


def test_invalid_command_lines(error_line, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        message = f"--host, --port: 127.0.0.1:{port} cannot be served (Address already in use"
        assert message in error_line("--port", port)
    for arguments, message in (
        (("--host", "192.0.2.1", "--port", "0"), "--host, --port: 192.0.2.1:0 cannot be served"),
        (("--port", "70000"), "--port: 70000 must be"),
        (("--weights", "nothing.pt", "--port", "0"), "--weights: nothing.pt: no such file"),
        (("--max-images", "0"), "--max-images: 0 must be at least 1"),
    ):
        assert message in error_line(*arguments)
    monkeypatch.setenv("WORLD_SIZE", "0")
    assert "WORLD_SIZE" in error_line()


def test_missing_or_old_gradio(error_line):
    install = "pip install -r requirements-demo.txt"
    assert error_line(gradio=None) == f"error: the page needs Gradio: {install}"
    old = types.SimpleNamespace(__version__="6.4.0rc1")
    assert error_line(gradio=old) == f"error: the page needs Gradio 6.31 or newer, not 6.4.0rc1: {install}"


@pytest.fixture(scope="module")
def url(fine_tuned_file, tmp_path_factory):
    """Serve a page and return its URL. On SIGTERM it must exit without errors and leave no files."""
    pytest.importorskip("gradio", reason="pip install -r requirements-demo.txt")
    temporary = tmp_path_factory.mktemp("temporary")
    errors = temporary / "errors"
    line = command_line(["-m", "scripts.demo", "--model", MODEL, "--weights", fine_tuned_file, "--port", 0])
    variables = environment(TMPDIR=str(temporary), PYTHONUNBUFFERED="1")
    with (
        open(errors, "w") as stderr,
        subprocess.Popen(
            line, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as server,
    ):
        try:
            address = next((text for text in server.stdout if text.startswith("http://127.0.0.1:")), "")
            assert address, errors.read_text()
            yield address.split()[0]
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()
    assert errors.read_text() == "" and not list(temporary.glob("cca-demo-*"))


def test_served_page_matches_sample_py(url, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    client = pytest.importorskip("gradio_client").Client(url, verbose=False, download_files=tmp_path)
    job = client.submit([3, 7], "11", 5, 2.5, 0.9, 50, 0.95, api_name="/sample")
    *_, download, commands = job.result(timeout=600)
    steps = job.outputs()
    for place, line in enumerate(commands.splitlines(), 1):
        expected, classes = run_sample(line)
        names = [FASHION_CLASSES[label] for label in classes]
        (picture,) = [step[place] for step in steps if step[place].get("value")]
        assert " s per image" in picture["label"]
        with Image.open(picture["value"]) as image:
            assert np.array_equal(np.asarray(image), np.asarray(draw_grid(expected, 2, names)))
    with Image.open(download["value"]) as image:
        assert place == 3 and image.width > 3 * 2 * 96


def test_served_page_shows_errors(url):
    client = pytest.importorskip("gradio_client").Client(url, verbose=False)
    for values, message in (
        (([], "<i>", 5, 2.5, 0.9, 50, 0.95), "Seed: &#x27;&lt;i&gt;&#x27; is not an integer"),
        (([], "1", 1_000_000, 2.5, 0.9, 50, 0.95), "Images: 1000000 must be at most 64 here"),
        (([], "1", 5, 2.5, 0.9, None, 0.95), "Top-k: &#x27;&#x27; is not an integer"),
    ):
        status, *_ = client.predict(*values, api_name="/sample")
        assert status == f"<p class='error' role='alert'>{message}</p>"


def test_served_page_is_safe(url):
    """The page escapes paths, loads nothing from other servers, and samples only through its queue."""
    httpx = pytest.importorskip("httpx")
    html, config = (httpx.get(url + path).text for path in ("", "config"))
    assert "&lt;b&gt;a run" in config and "<b>a run" not in html + config
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", html)
    response = httpx.post(f"{url}gradio_api/run/sample", json={"data": []})
    assert response.is_error and "Please join the queue" in response.text
