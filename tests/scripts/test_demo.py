"""The page's requests against sample.py, its refusals, and a served page asked by Gradio's client."""

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


def made(*arguments):
    return demo.Demo(demo.make_parser().parse_args(["--model", MODEL, *arguments]), torch.device("cpu"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run with weights that are not the base's, at a path that would be markup in HTML."""
    path = tmp_path_factory.mktemp("demo") / "<b>a run" / "model.pt"
    path.parent.mkdir()
    generator = torch.Generator().manual_seed(1)
    state = load_model(MODEL).transformer.state_dict()
    moved = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
    save_published(moved, path, "model")
    return path


@pytest.fixture(scope="module")
def three_ways(tuned):
    return made("--weights", str(tuned.parent), "--batch-size", "2")


def sampled(line):
    """Images and classes of the file that this sample.py command makes."""
    python, file, *arguments = shlex.split(line)
    assert (python, file) == ("python", "sample.py")
    sample.main(arguments)
    with np.load(arguments[-1]) as samples:
        return samples["arr_0"], samples["arr_1"].tolist()


def test_commands_make_the_same_pixels(three_ways, tuned, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    panels, shown = three_ways.plan(OPTIONS), []
    assert [panel.title for panel in panels] == [
        "Base, no guidance", "Base, guidance 2.5", "CCA, no guidance",
    ]  # fmt: skip
    for panel in panels:
        sizes = []
        for images in three_ways.sample(panel):
            sizes.append(len(images))
        assert sizes == [2, 4, 5]  # batch by batch
        expected, classes = sampled(panel.command)
        assert np.array_equal(expected, np.stack(images)) and classes == [3, 7, 3, 7, 3]
        shown.append(expected)
    first, *others = shown
    assert all((images != first).any() for images in others)
    assert f"--weights '{tuned}'" in panels[2].command
    assert "--cfg-scale" not in panels[0].command + panels[2].command


def test_without_weights_two_ways_and_as_many_images_as_wanted():
    few = made("--max-images", "5")
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
def test_wrong_values_are_refused_before_anything_is_made(three_ways, option, value, message):
    with pytest.raises(UserError) as caught:
        three_ways.plan({**OPTIONS, option: value})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "place, message",
    [
        ("generate_tokens", "--batch-size: 2 images at once do not fit in the GPU's memory"),
        ("to_pixels", "--model: decoding does not fit in GPU memory"),
    ],
)
def test_memory_that_runs_out_ends_a_request_and_not_the_page(place, message, three_ways, monkeypatch):
    panel = three_ways.plan(OPTIONS)[2]
    with monkeypatch.context() as patch:
        patch.setattr(sampler, place, memory_full)
        with pytest.raises(UserError) as caught:
            list(three_ways.sample(panel))
    assert str(caught.value).startswith(message)
    *_, images = three_ways.sample(panel)
    assert len(images) == 5


@pytest.mark.parametrize("model", sorted(ZOO))
def test_the_page_starts_with_options_that_are_right(model):
    classes = zoo_entry(model).transformer.num_classes
    start = demo.defaults(model, classes, 16)
    arguments = [word for pair in start.items() for word in pair]
    args = sample.make_parser().parse_args(["--model", model, "--output", "x.npz", *arguments])
    assert args.cfg_scale > 1 and args.num_samples <= 16
    if args.classes != "all":
        assert int(args.classes) < classes


def test_of_a_run_the_state_is_named_that_is_shown(tmp_path):
    def pinned(weights):
        args = demo.make_parser().parse_args(["--model", MODEL, "--weights", weights])
        return list(demo.files_by_weights(args))[-1]

    for step in (3, 12):
        (tmp_path / "state" / f"step-{step}").mkdir(parents=True)
    assert pinned(f"{tmp_path}") == f"{tmp_path}/state/step-12"
    assert pinned(f"{tmp_path}:ema") == f"{tmp_path}/state/step-12:ema"
    (tmp_path / "model_ema.pt").touch()
    assert pinned(f"{tmp_path}:ema") == f"{tmp_path}/model_ema.pt"
    assert pinned("base") == "base"


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """The one line of a command that is refused, which leaves nothing; Gradio need not be there."""
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    newest = types.SimpleNamespace(__version__="99.0.0")

    def message(*arguments, gradio=newest):
        monkeypatch.setitem(sys.modules, "gradio", gradio)
        with pytest.raises(SystemExit) as caught:
            run_command(lambda: demo.main(["--model", MODEL, *arguments]))
        (line,) = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2 and not list(tmp_path.iterdir())
        return line

    return message


def test_wrong_command_lines(refused, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = f"--host, --port: 127.0.0.1:{port} cannot be served (Address already in use"
        assert message in refused("--port", port)
    for arguments, message in (
        (("--host", "192.0.2.1", "--port", "0"), "--host, --port: 192.0.2.1:0 cannot be served"),
        (("--port", "70000"), "--port: 70000 must be"),
        (("--weights", "nothing.pt", "--port", "0"), "--weights: nothing.pt: no such file"),
        (("--max-images", "0"), "--max-images: 0 must be at least 1"),
    ):
        assert message in refused(*arguments)
    monkeypatch.setenv("WORLD_SIZE", "0")
    assert "WORLD_SIZE" in refused()


def test_without_gradio_or_with_an_old_one_a_line_says_what_to_install(refused):
    install = "pip install -r requirements-demo.txt"
    assert refused(gradio=None) == f"error: the page needs Gradio: {install}"
    old = types.SimpleNamespace(__version__="6.4.0rc1")
    assert refused(gradio=old) == f"error: the page needs Gradio 6.31 or newer, not 6.4.0rc1: {install}"


@pytest.fixture(scope="module")
def url(tuned, tmp_path_factory):
    """A page that is served; it ends when it is told to, says nothing and leaves nothing."""
    pytest.importorskip("gradio", reason="pip install -r requirements-demo.txt")
    temporary = tmp_path_factory.mktemp("temporary")
    errors = temporary / "errors"
    line = command_line(["-m", "scripts.demo", "--model", MODEL, "--weights", tuned, "--port", 0])
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


def test_the_page_shows_what_sample_py_makes(url, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    client = pytest.importorskip("gradio_client").Client(url, verbose=False, download_files=tmp_path)
    job = client.submit([3, 7], "11", 5, 2.5, 0.9, 50, 0.95, api_name="/sample")
    *_, download, commands = job.result(timeout=600)
    steps = job.outputs()
    for place, line in enumerate(commands.splitlines(), 1):
        expected, classes = sampled(line)
        names = [FASHION_CLASSES[label] for label in classes]
        (picture,) = [step[place] for step in steps if step[place].get("value")]
        assert " s per image" in picture["label"]
        with Image.open(picture["value"]) as image:
            assert np.array_equal(np.asarray(image), np.asarray(draw_grid(expected, 2, names)))
    with Image.open(download["value"]) as image:
        assert place == 3 and image.width > 3 * 2 * 96


def test_what_is_wrong_is_a_line_on_the_page(url):
    client = pytest.importorskip("gradio_client").Client(url, verbose=False)
    for values, message in (
        (([], "<i>", 5, 2.5, 0.9, 50, 0.95), "Seed: &#x27;&lt;i&gt;&#x27; is not an integer"),
        (([], "1", 1_000_000, 2.5, 0.9, 50, 0.95), "Images: 1000000 must be at most 64 here"),
        (([], "1", 5, 2.5, 0.9, None, 0.95), "Top-k: &#x27;&#x27; is not an integer"),
    ):
        status, *_ = client.predict(*values, api_name="/sample")
        assert status == f"<p class='error' role='alert'>{message}</p>"


def test_the_page_asks_nobody_else_and_samples_in_its_queue_alone(url):
    httpx = pytest.importorskip("httpx")
    html, config = (httpx.get(url + path).text for path in ("", "config"))
    assert "&lt;b&gt;a run" in config and "<b>a run" not in html + config
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", html)
    past_the_queue = httpx.post(f"{url}gradio_api/run/sample", json={"data": []})
    assert past_the_queue.is_error and "Please join the queue" in past_the_queue.text
