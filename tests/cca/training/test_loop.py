"""Training as users run it: several ranks, micro-batches, interruption and resume."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import (
    ROOT,
    TRAIN,
    after_plan,
    command_line,
    environment,
    expect_error,
    lines,
    metrics,
    run,
    start,
    wait_until,
)
from made_data import bundled, make_codes, make_image_folder

import train_llamagen_cca
import train_var_cca
from models import UserError, load_model
from scripts import extract_codes


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    np.savez(folder / "images.npz", **bundled(80))
    data = ["--data", str(folder / "images.npz"), "--output", str(folder / "codes")]
    extract_codes.main(["--model", "llamagen-mini", *data])
    return folder / "codes"


@pytest.fixture(params=["var", "llamagen"])
def command(request, codes):
    data = ["--data", TRAIN] if request.param == "var" else ["--codes", codes]
    short = ["--batch-size", 16, "--max-steps", 5, "--save-every", 1]
    return [f"train_{request.param}_cca.py", "--model", f"{request.param}-mini", *data, *short]


PAIR_METRICS = (
    *("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"),
    *("logps/chosen", "logps/rejected"),
)


def find_model_file(folder):
    return next(folder.glob("model.pt*"))


def load_weights(folder):
    content = torch.load(find_model_file(folder), weights_only=True)
    return content.get("model", content)


def assert_equal_metrics(a, b):
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5), x["step"]
        for name in (*PAIR_METRICS, "grad_norm"):
            assert x[name] == pytest.approx(y[name], rel=1e-4, abs=1e-4), name


def run_in_process(command):
    """Run a training command in this process."""
    main = {"train_var_cca.py": train_var_cca, "train_llamagen_cca.py": train_llamagen_cca}[command[0]].main
    main([*map(str, command[1:])])


def compare_setups(command, tmp_path, setups):
    """Train once in one process and once with each of ``setups``; compare the metrics of all steps."""
    run_in_process([*command, "--output", tmp_path / "one"])
    for name, processes, options in setups:
        line = [*command, *options, "--output", tmp_path / name]
        if processes == 1:
            run_in_process(line)
        else:
            run(*line, processes=processes)
        assert_equal_metrics(tmp_path / "one", tmp_path / name)
    assert [m["step"] for m in metrics(tmp_path / "one")] == [1, 2, 3, 4, 5]
    first = metrics(tmp_path / "one")[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)  # policy and reference are equal
    assert first["logps/chosen"] > first["logps/rejected"]


@pytest.mark.parametrize("command", ["llamagen", pytest.param("var", marks=pytest.mark.slow)], indirect=True)
def test_setups_give_equal_metrics(command, tmp_path):
    compare_setups(
        command,
        tmp_path,
        [
            ("two", 2, ["--micro-batch-size", 3]),
            ("sharded", 2, ["--parallel", "fsdp", "--micro-batch-size", 4]),
            ("checkpointed", 1, ["--checkpointing"]),
        ],
    )
    model = load_model(command[2], str(find_model_file(tmp_path / "one")))
    assert torch.equal(
        next(model.transformer.parameters()), next(iter(load_weights(tmp_path / "one").values()))
    )
    assert list((tmp_path / "one" / "tensorboard").iterdir())
    whole, sharded = load_weights(tmp_path / "one"), load_weights(tmp_path / "sharded")
    assert list(whole) == list(sharded)
    assert all(torch.allclose(whole[k], sharded[k], atol=1e-4) for k in whole)


@pytest.mark.slow
def test_four_ranks_and_compile(command, tmp_path):
    sharded = ("sharded", 4, ["--parallel", "fsdp", "--checkpointing"])
    compare_setups(command, tmp_path, [("four", 4, []), sharded, ("compiled", 1, ["--compile"])])


KILLED = """
import os, signal, sys, time
import cca.training.loop as loop
from importlib import import_module
command, part_of_a_step, *arguments = sys.argv[1:]
show, shown = loop.show, []
def show_and_be_killed(*given):
    show(*given)
    shown.append(time.monotonic())
    if len(shown) == 2:
        signal.setitimer(signal.ITIMER_REAL, float(part_of_a_step) * (shown[1] - shown[0]))
    if len(shown) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
loop.show = show_and_be_killed
import_module(command.removesuffix(".py")).main(arguments)
"""


@pytest.mark.parametrize("kills, steps", [(2, 8), pytest.param(10, 40, marks=pytest.mark.slow)])
def test_killed_run_equals_uninterrupted_run(command, kills, steps, tmp_path):
    """SIGALRM kills each attempt at a random moment of its third step, or SIGKILL at the end of that step."""
    command, generator = [*command, "--max-steps", steps], random.Random(0)
    run_in_process([*command, "--output", tmp_path / "whole"])
    for _ in range(kills):
        driver = ["-c", KILLED, command[0], generator.uniform(0, 1), *command[1:]]
        line = command_line([*driver, "--output", tmp_path / "cut"])
        killed = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True)
        assert killed.returncode in (-signal.SIGALRM, -signal.SIGKILL), killed.stderr
    run_in_process([*command, "--output", tmp_path / "cut"])
    expected, found = load_weights(tmp_path / "whole"), load_weights(tmp_path / "cut")
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert [m["step"] for m in metrics(tmp_path / "cut")] == list(range(1, steps + 1))
    assert (
        not list((tmp_path / "cut").rglob("*.tmp")) and len(list((tmp_path / "cut" / "state").iterdir())) == 1
    )


def test_stop_signals_save_and_print_one_line(command, tmp_path):
    """A scheduler signals the whole process group, workers included. A user may press Ctrl-C twice."""
    numbers = [signal.SIGTERM] if "--data" in command else [signal.SIGINT, signal.SIGINT, signal.SIGHUP]
    command = [*command, "--max-steps", 10**9, "--save-every", 1000, "--workers", 1, "--output", tmp_path]
    process = start(command_line(command))
    try:
        wait_until(process, lambda: len(lines(tmp_path / "metrics.jsonl")) >= 2)
        for number in numbers:
            os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):  # if the signal is ignored, the run never ends
            os.killpg(process.pid, signal.SIGKILL)
    steps = len(metrics(tmp_path))
    assert process.returncode == 0, err
    assert re.fullmatch(rf"stopped after step {steps}, .*\n", after_plan(out))
    # stderr contains only the progress bar.
    assert not [line for line in err.splitlines() if line.strip() and not re.search("it/s|s/it", line)]
    assert [path.name for path in (tmp_path / "state").iterdir()] == [f"step-{steps}"]
    assert not (tmp_path / ".lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["training", "sampling"])
def test_sigterm_to_one_rank_stops_all(kind, command, tmp_path):
    if kind == "sampling":
        command, output = ["sample.py", "--model", command[2], "--num-samples", 200_000], tmp_path / "s.npz"
    else:
        command, output = [*command, "--max-steps", 10**6, "--save-every", 1000], tmp_path
    process = start(command_line([*command, "--output", output], 2))
    parts = tmp_path / "s.npz.parts"
    wait_until(process, lambda: len([*parts.glob("*.npy"), *lines(tmp_path / "metrics.jsonl")]) >= 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert sum(line.startswith("stopped") for line in out.splitlines()) == 1


@pytest.mark.slow
def test_folder_of_running_process_is_refused(tmp_path):
    command = ["train_var_cca.py", "--model", "var-mini", "--data", TRAIN, "--batch-size", 4]
    command += ["--max-steps", 10**6, "--output", tmp_path]
    process = start(command_line(command))
    wait_until(process, lambda: len(lines(tmp_path / "metrics.jsonl")) >= 1)
    expect_error(command, "--output", f"is being written by process {process.pid}")
    assert process.poll() is None
    process.kill()
    process.wait()


def test_ten_skipped_steps_stop_run(tmp_path):
    codes, output = make_codes(tmp_path), tmp_path / "run"
    common = ["--model", "llamagen-mini", "--codes", codes, "--batch-size", 4, "--max-steps", 20]
    expect_error(
        ["train_llamagen_cca.py", *common, "--lr", "1e30", "--save-every", 1, "--output", output],
        "10 steps in a row had no finite gradient",
        "--lr",
    )
    # The tenth step is neither logged nor saved. The metrics of the ninth count nine skipped steps.
    assert metrics(tmp_path / "run")[-1]["skipped_steps"] == 9


def test_published_codes_equal_packed_codes(tmp_path):
    common = ["--model", "llamagen-mini", "--batch-size", "8", "--max-steps", "6", "--output"]
    for name, published in (("packed", False), ("published", True)):
        codes = make_codes(tmp_path / name, published=published)
        train_llamagen_cca.main([*common, str(tmp_path / f"{name}-run"), "--codes", str(codes)])
    assert_equal_metrics(tmp_path / "packed-run", tmp_path / "published-run")


def test_image_folder_with_unreadable_images(tmp_path):
    broken = make_image_folder(tmp_path / "data", 60)
    common = ["train_var_cca.py", "--model", "var-mini", "--loss", "sft", "--data", tmp_path / "data"]
    common += ["--batch-size", 30, "--lr", 0]
    result = run(*common, "--workers", 2, "--output", tmp_path / "run")
    assert result.stderr.count(str(broken)) == 1
    broken.with_name("another.png").write_bytes(b"no image")
    expect_error([*common, "--output", tmp_path / "other"], "2 of 61 images cannot be read")


def test_weights_do_not_depend_on_workers(tmp_path):
    """The random crops are sampled in the data-loading workers."""
    make_image_folder(tmp_path / "data", 40).unlink()
    common = [
        "--model",
        "var-mini",
        "--data",
        str(tmp_path / "data"),
        "--batch-size",
        "8",
        "--max-steps",
        "6",
    ]
    for workers in ("0", "2"):
        torch.manual_seed(int(workers))
        train_var_cca.main([*common, "--workers", workers, "--output", str(tmp_path / workers)])
    none, two = load_weights(tmp_path / "0"), load_weights(tmp_path / "2")
    assert all(torch.equal(none[name], two[name]) for name in none)


def test_losses_and_options(codes, tmp_path):
    common = ["--model", "llamagen-mini", "--codes", str(codes), "--batch-size", "16", "--max-steps", "2"]
    common += ["--uncond-ratio", "0", "--dtype", "bfloat16"]
    options = {
        "dpo": ["--ema", "0.9"],
        "unlearning": ["--sample-every", "2"],
        "sft": ["--checkpointing", "--final-weight-decay", "0.1"],
    }
    for loss, more in options.items():
        train_llamagen_cca.main([*common, *more, "--loss", loss, "--output", str(tmp_path / loss)])
        found = metrics(tmp_path / loss)[-1]
        assert all(value == value for value in found.values())
        logged = {name for name in found if "/" in name}  # no batch entry has the null class here
        assert logged == ({"logps/chosen"} if loss == "sft" else set(PAIR_METRICS))
        assert loss != "sft" or found["loss"] == pytest.approx(-found["logps/chosen"])
        assert (tmp_path / loss / "curves.png").read_bytes()[:4] == b"\x89PNG"
    start, end, average = (
        load_model("llamagen-mini", w).transformer.output.weight
        for w in ("base", str(tmp_path / "dpo/model.pt"), str(tmp_path / "dpo/model_ema.pt"))
    )
    assert 0 < (average - start).norm() < (end - start).norm()
    assert (tmp_path / "unlearning" / "samples" / "step-000002.png").read_bytes()[:4] == b"\x89PNG"
    assert [m["weight_decay"] for m in metrics(tmp_path / "sft")] == pytest.approx([0.05, 0.1])


IN_ONE_PROCESS = """
import os, sys, torch, train_var_cca
train_var_cca.main(sys.argv[1:])
assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
assert not torch.is_deterministic_algorithms_warn_only_enabled()
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
import torch._inductor.config as compiler
assert getattr(compiler, "deterministic", True)
"""


def test_deterministic_runs_are_bit_identical(tmp_path):
    common = ["--model", "var-mini", "--data", TRAIN, "--batch-size", 8, "--max-steps", 3]
    for name in ("one", "two"):
        options = ["--deterministic", "--sample-every", 2, "--output", tmp_path / name]
        run("-c", IN_ONE_PROCESS, *common, *options)
    one, two = tmp_path / "one", tmp_path / "two"
    expected, found = load_weights(one), load_weights(two)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    grid, other_grid = ((folder / "samples" / "step-000002.png").read_bytes() for folder in (one, two))
    assert grid == other_grid
    for line, other in zip(metrics(one), metrics(two), strict=True):
        del line["images_per_second"], other["images_per_second"]
        assert line == other
    assert json.loads((one / "config.json").read_text())["options"]["deterministic"] is True
    with pytest.raises(UserError, match="deterministic True instead of False"):
        train_var_cca.main([*map(str, common), "--output", str(one)])
