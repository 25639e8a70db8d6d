"""The page's requests without the page: what it shows, refuses and says, against sample.py."""

import os
import shlex
import socket
import sys
import types

import numpy as np
import pytest
import torch

import sample
from models import ZOO, UserError, load_model, zoo_entry
from models.errors import run_command
from models.weights import save_published
from scripts import demo

MODEL = "llamagen-mini"
OPTIONS = {
    "--classes": "3,7", "--num-samples": "5", "--seed": " 11", "--cfg-scale": "2.5", "--temperature": "0.9",
    "--top-k": "50", "--top-p": "0.95",
}  # fmt: skip


def tuned_weights(path):
    """Weights that are not the base's."""
    generator = torch.Generator().manual_seed(1)
    state = load_model(MODEL).transformer.state_dict()
    moved = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
    path.parent.mkdir(exist_ok=True)
    save_published(moved, path, "model")


def made(*arguments):
    return demo.Demo(demo.make_parser().parse_args(["--model", MODEL, *arguments]), torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    tuned_weights(folder / "a run" / "model.pt")
    return folder


@pytest.fixture(scope="module")
def three_ways(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        return made("--weights", "a run", "--batch-size", "2")
    finally:
        os.chdir(before)


def test_commands_make_the_same_pixels(three_ways, folder, monkeypatch):
    monkeypatch.chdir(folder)
    *_, last = three_ways.sample(OPTIONS)
    assert [panel.title for panel in last.panels] == [
        "Base, no guidance", "Base, guidance 2.5", "CCA, no guidance",
    ]  # fmt: skip
    for line, panel in zip(demo.commands(last.panels).splitlines(), last.panels, strict=True):
        python, file, *arguments = shlex.split(line)
        assert (python, file) == ("python", "sample.py")
        sample.main(arguments)
        with np.load(f"{panel.name}.npz") as samples:
            assert np.array_equal(samples["arr_0"], panel.images)
            assert samples["arr_1"].tolist() == [3, 7, 3, 7, 3]
        assert 0 < panel.token_seconds < panel.seconds
    first, *others = [panel.images for panel in last.panels]
    assert all((images != first).any() for images in others)
    assert "--weights 'a run/model.pt'" in last.panels[2].command
    assert "--cfg-scale" not in last.panels[0].command + last.panels[2].command


def test_a_request_goes_on_batch_by_batch(three_ways):
    steps = list(three_ways.sample(OPTIONS))
    assert [step.made for step in steps] == [0, 2, 4, 5, 7, 9, 10, 12, 14, 15]
    assert {step.total for step in steps} == {15}
    assert [len(step.panels) for step in steps] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    widths = [panel.picture.width for panel in steps[-1].panels]
    assert (
        demo.comparison(steps[-1].panels).width > sum(widths) and steps[-1].panels[0].picture.height > 3 * 96
    )


def test_without_weights_two_ways():
    *_, last = made().sample(OPTIONS)
    assert [panel.name for panel in last.panels] == ["base", "guided"]


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--seed", "-1", "--seed: -1 must be at least 0"),
        ("--seed", f"{2**63}", "--seed: 9223372036854775808 must be at least 0 and at most"),
        ("--seed", "--output=x.npz", "--seed: '--output=x.npz' is not an integer"),
        ("--num-samples", "0", "--num-samples: 0 must be at least 1"),
        ("--num-samples", "65", "--num-samples: 65 must be at most 64 here"),
        ("--num-samples", "2.5", "--num-samples: '2.5' is not an integer"),
        ("--classes", "3,10", "--classes: 3,10 goes beyond 0 … 9"),
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
        next(three_ways.sample({**OPTIONS, option: value}))
    assert str(caught.value).startswith(message)


def test_other_options_are_refused(three_ways):
    with pytest.raises(UserError, match="wanted are --classes, "):
        next(three_ways.sample({**OPTIONS, "--output": "x.npz"}))


def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize(
    "place, message",
    [
        ("sample_tokens", "--batch-size: 2 images at once do not fit in the GPU's memory ("),
        ("decode_tokens", "--model: decoding images of llamagen-mini does not fit in the GPU's memory ("),
    ],
)
def test_memory_that_runs_out_ends_a_request_and_not_the_page(place, message, three_ways, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(demo, place, full)
        with pytest.raises(UserError) as caught:
            list(three_ways.sample(OPTIONS))
    assert str(caught.value).startswith(message)
    *_, last = three_ways.sample(OPTIONS)
    assert len(last.panels) == 3


def test_models_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(demo, "prepare", full)
    with pytest.raises(UserError, match="^--model: llamagen-mini does not fit in the GPU's memory"):
        made("--dtype", "bfloat16")


def test_large_images_are_fewer():
    with_limit = made("--max-images", "3")
    with pytest.raises(UserError, match="5 must be at most 3 here"):
        next(with_limit.sample(OPTIONS))
    assert with_limit.defaults["--num-samples"] == "3"


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
        return demo.pinned_weights(args)

    for step in (3, 12):
        (tmp_path / "state" / f"step-{step}").mkdir(parents=True)
    assert pinned(f"{tmp_path}") == f"{tmp_path}/state/step-12"
    assert pinned(f"{tmp_path}:ema") == f"{tmp_path}/state/step-12:ema"
    (tmp_path / "model_ema.pt").touch()
    assert pinned(f"{tmp_path}:ema") == f"{tmp_path}/model_ema.pt"
    assert pinned("cca") == "cca" and pinned("base") == "base"


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """The one line of a command that is refused; the page itself is not there."""
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    page = types.SimpleNamespace(serve=lambda *_: None)
    monkeypatch.setitem(sys.modules, "scripts.demo_page", page)

    def message(*arguments):
        with pytest.raises(SystemExit) as caught:
            run_command(lambda: demo.main(["--model", MODEL, *arguments]))
        (line,) = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2 and not list(tmp_path.iterdir())
        return line

    return message


def test_wrong_command_lines(refused, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--host, --port: 127.0.0.1:{port} cannot be served (Address already in use" in refused(
            "--port", port
        )
    assert "--host, --port: 192.0.2.1:0 cannot be served" in refused("--host", "192.0.2.1", "--port", "0")
    assert "--port: 70000 must be" in refused("--port", "70000")
    assert "--weights: nothing.pt: no such file" in refused("--weights", "nothing.pt", "--port", "0")
    assert "--weights: no cca weights are published" in refused("--weights", "cca", "--port", "0")
    assert "--max-images: 0 must be at least 1" in refused("--max-images", "0")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "0")
        assert "WORLD_SIZE" in refused()


def test_without_gradio_one_line_says_what_to_install(refused, monkeypatch):
    monkeypatch.delitem(sys.modules, "scripts.demo_page")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert refused() == "error: the page needs Gradio: pip install -r requirements-demo.txt"
