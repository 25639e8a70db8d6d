"""Training as users run it: processes, micro-batches, interruption, resume."""

import json
import signal
import subprocess
import time

import pytest
import torch
from commands import ROOT, TRAIN, command_line, environment, run

from models import load_model


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    run("-m", "scripts.extract_codes", "--model", "llamagen-mini", "--data", TRAIN, "--output", folder)
    return folder


@pytest.fixture(params=["var", "llamagen"])
def command(request, codes):
    data = ["--data", TRAIN] if request.param == "var" else ["--codes", codes]
    return [f"train_{request.param}_cca.py", "--model", f"{request.param}-mini", *data, "--batch-size", 16, "--max-steps", 5, "--save-every", 1]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def model_file(folder):
    return next(folder.glob("model.pt*"))


def weights(folder):
    content = torch.load(model_file(folder), weights_only=True)
    return content.get("model", content)


def same_losses(a, b):
    for x, y in zip(metrics(a), metrics(b), strict=True):
        for name in ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "grad_norm"):
            assert x[name] == pytest.approx(y[name], rel=1e-4, abs=1e-5), name


def test_processes_and_micro_batches_do_not_matter(command, tmp_path):
    run(*command, "--output", tmp_path / "one")
    run(*command, "--output", tmp_path / "two", "--micro-batch-size", 3, processes=2)
    same_losses(tmp_path / "one", tmp_path / "two")
    assert [m["step"] for m in metrics(tmp_path / "one")] == [1, 2, 3, 4, 5]
    first = metrics(tmp_path / "one")[0]
    assert first["margin"] == pytest.approx(0, abs=1e-3)  # policy and reference start as one
    model = load_model(command[2], str(model_file(tmp_path / "one")))
    assert torch.equal(next(model.transformer.parameters()), next(iter(weights(tmp_path / "one").values())))
    assert list((tmp_path / "one" / "tensorboard").iterdir())


def interrupt(command, folder, number, after):
    process = subprocess.Popen(command_line([*command, "--output", folder]), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    while process.poll() is None and len(metrics_lines(folder)) < after:
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait()


def metrics_lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_killed_run_ends_where_an_uninterrupted_one_does(command, tmp_path):
    run(*command, "--output", tmp_path / "whole")
    interrupt(command, tmp_path / "cut", signal.SIGKILL, 1)
    assert interrupt(command, tmp_path / "cut", signal.SIGTERM, 3) == 0
    run(*command, "--output", tmp_path / "cut")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert [m["step"] for m in metrics(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    assert not list((tmp_path / "cut").rglob("*.tmp"))


def test_losses_and_options(codes, tmp_path):
    common = ["train_llamagen_cca.py", "--model", "llamagen-mini", "--codes", codes, "--batch-size", 16, "--max-steps", 2]
    for loss in ("dpo", "unlearning", "sft"):
        run(*common, "--loss", loss, "--uncond-ratio", 0, "--dtype", "bfloat16", "--output", tmp_path / loss)
        found = metrics(tmp_path / loss)[-1]
        assert all(value == value for value in found.values())
        assert "null_reward" not in found


def test_other_options_are_refused(tmp_path):
    common = ["train_var_cca.py", "--model", "var-mini", "--data", TRAIN, "--batch-size", 4, "--max-steps", 1, "--output", tmp_path]
    run(*common)
    before = weights(tmp_path)["pos_1LC"]
    result = subprocess.run(command_line([*common, "--beta", 0.5]), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 2
    assert "beta 0.2 instead of 0.5" in result.stderr and len(result.stderr.splitlines()) == 1
    assert torch.equal(before, weights(tmp_path)["pos_1LC"])
