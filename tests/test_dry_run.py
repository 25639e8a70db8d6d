"""--dry-run prints the plan of every command in README and docs. It uses no network and writes nothing."""

import json
import re
import shlex
import shutil
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import ROOT
from huggingface_hub import constants
from made_data import make_picture
from rehearsal import rehearse
from test_documentation import COMMANDS, LINES, module_and_options

import eval_fid
import sample
import train_var_cca
from models.utils.errors import UserError
from scripts import convert_weights, extract_codes, make_reference, reproduce

PLANNED = [
    (page, line)
    for page, line in LINES
    if COMMANDS.match(line)
    and "--compare" not in line
    and "--dry-run" in module_and_options(line)[0].make_parser().format_help()
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change to a folder with small placeholders for the files that README and docs name.

    Caches are empty, the disk has free space, and the network fails the test.
    """
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a dry run uses the network"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**13, total=10**14))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name, classes in (("imagenet", ("n01440764", "n01443537")), ("photos", ("tabby", "my_dog"))):
        for kind in classes:
            for i in range(130):
                make_picture(here / name / kind / f"{i}.png", size=(8, 8))
    (here / "assets").symlink_to(ROOT / "assets")
    runs = [f"runs/{name}/model.pth" for name in ("my", "d16-cca", "d30-cca")] + [
        f"runs/{name}/model.pt"
        for name in ("my-base", "my-cca", "llamagen-mini-cca", "quickstart/llamagen-mini-cca")
    ]
    for file in (*runs, "model.pt"):
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"a": torch.zeros(1)}, here / file)
    for file in ("d16-cca.npz", "d30-cca.npz", "my.npz", "reference.npz"):
        np.savez(here / file, arr_0=np.zeros((8, 256, 256, 3), np.uint8), arr_1=np.arange(8))
    for codes, length, vocab_size in (("codes384", 576, 16384), ("codes", 64, 512)):
        (here / codes).mkdir()
        np.save(here / codes / "codes.npy", np.zeros((300, 1, length), np.uint16))
        np.save(here / codes / "labels.npy", np.arange(300) % 10)
        (here / codes / "header.json").write_text(json.dumps({"vocab_size": vocab_size}))
    return here


def snapshot(folder):
    """Return the modification time of each path in the parent of ``folder``, which includes the caches."""
    return {str(path): path.lstat().st_mtime_ns for path in folder.parent.rglob("*")}


@pytest.mark.parametrize("page, line", PLANNED)
def test_plan_of_documented_command(page, line, folder, capsys):
    for text, file in re.findall(r"^echo '(.*)' > (\S+)", (ROOT / page).read_text(), re.M):
        (folder / file).write_text(text)
    for output in re.findall(r"--output (\S+)", line):  # the fixture wrote it for commands that read it
        shutil.rmtree(folder / output) if (folder / output).is_dir() else (folder / output).unlink(True)
    before = snapshot(folder)
    module, options = module_and_options(line)
    module.main([*options, "--dry-run"])
    printed = capsys.readouterr()
    assert not printed.err
    lines = printed.out.splitlines()
    rows = dict(row.split(maxsplit=1) for row in lines if row and not row.startswith(" "))
    columns = {re.match(r"(\S+)? +", row).end() for row in lines if row}
    assert rows.keys() & {"writes", "serves"} and len(columns) == 1, printed.out
    published = any(model in line for model in ("var-d16", "var-d30", "var-d36", "llamagen-l "))
    assert ("downloads" in rows) == (published or "eval_fid" in line or "make_reference" in line), printed.out
    assert snapshot(folder) == before


EXPERIMENTS = [line for _, line in LINES if "scripts/reproduce_" in line and "--mini" not in line] + [
    "bash scripts/reproduce_llamagen.sh --data IMAGENET --reference imagenet256 --models llamagen-l",
    "bash scripts/reproduce_llamagen.sh --from-released --reference imagenet256",
    "bash scripts/reproduce_tradeoff.sh --data IMAGENET --reference imagenet256 --models var-d24",
    "bash scripts/reproduce_ablation.sh --data IMAGENET --reference imagenet256 --models var-d24",
    "bash scripts/reproduce_with_guidance.sh --data IMAGENET --reference imagenet256 --models llamagen-b",
]


@pytest.mark.parametrize("line", EXPERIMENTS)
def test_plan_of_reproduce_commands(line, folder, monkeypatch):
    """Plan each command that a reproduce script starts, with placeholders for the outputs of earlier ones."""
    (folder / "IMAGENET").symlink_to("imagenet")
    _, script, *options = shlex.split(line)
    started = []

    def call(command):
        assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
        started.append(shlex.join(command[3:]))
        rehearse(f"torchrun {started[-1]}")
        return 0

    monkeypatch.setattr(reproduce.subprocess, "call", call)
    (experiment,) = re.findall(r"scripts\.reproduce ([a-z-]+)", (ROOT / script).read_text())
    reproduce.main([experiment, *(option for option in options if option != "--dry-run")])
    assert len(started) == len(set(started)) > 2
    assert (folder / f"runs/reproduce/{experiment}.md").exists()


def test_download_size_and_free_space(folder, capsys, monkeypatch):
    """The plan shows the size of a download. A disk that is too small is refused."""
    command = ["--model", "var-d16", "--num-samples", "8", "--output", "s.npz"]
    sample.main([*command, "--dry-run"])
    out = capsys.readouterr().out
    assert "~1.2 GB: FoundationVision/var/var_d16.pth" in out
    assert "HF_HUB_OFFLINE" not in out
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        sample.main([*command, "--dry-run"])
    assert "HF_HUB_OFFLINE is set, so they will be refused" in capsys.readouterr().out
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**9, used=0, total=10**9))
    for arguments in (command, [*command, "--dry-run"]):
        with pytest.raises(
            UserError, match=r"--weights: .*var_d16.pth .*\(~1.7 GB in all\), but .* 1.0 GB free"
        ):
            sample.main(arguments)
    assert not list(folder.glob("s.npz*"))


def test_bad_images_are_refused_before_plan(folder, capsys):
    """The refusal comes before gigabytes of a reference are downloaded (``folder`` refuses the network)."""
    np.savez("few.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    np.savez("none.npz", arr_0=np.zeros((0, 8, 8, 3), np.uint8))
    np.savez("nan.npz", mu=np.full(2, np.nan), sigma=np.eye(2), arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    for samples, reference, message in (
        ("few.npz", "imagenet256", "few.npz: holds 4 images; at least 5 are needed"),
        ("d16-cca.npz", "few.npz", "few.npz: holds 4 images; at least 5 are needed"),
        ("d16-cca.npz", "none.npz", "--reference: none.npz holds neither images nor mu and sigma"),
        ("d16-cca.npz", "nan.npz", "nan.npz: mu holds values that are not finite"),
    ):
        with pytest.raises(UserError, match=message):
            eval_fid.main(["--samples", samples, "--reference", reference])
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "main, options, message",
    [
        (sample.main, ["--model", "var-d16", "--weights", "no.pth", "--output", "s.npz"], "no.pth: no such"),
        (eval_fid.main, ["--samples", "no.npz", "--reference", "d16-cca.npz"], "no.npz"),
        (train_var_cca.main, ["--model", "var-d16", "--data", "nothing", "--output", "r"], "nothing"),
        (make_reference.main, ["--images", "nothing", "--output", "r.npz"], "nothing"),
        (convert_weights.main, ["no.pt", "m.pth"], "no.pt"),
        (
            extract_codes.main,
            ["--model", "llamagen-l", "--data", "nothing", "--output", "new-codes"],
            "nothing",
        ),
    ],
)
def test_missing_data_is_refused(main, options, message, folder):
    before = snapshot(folder)
    with pytest.raises((UserError, FileNotFoundError), match=message):
        main([*options, "--dry-run"])
    assert snapshot(folder) == before


TRAIN = ["--model", "var-mini", "--data", "assets/fashion-mnist-train-10k.npz", "--max-steps", "3", "--seed"]
CODES = ["--model", "llamagen-mini", "--data", "few.npz", "--output"]


def test_plan_with_existing_output(folder, capsys):
    """The plan says what is resumed. Other options are refused before the plan, also without --dry-run."""
    np.savez("few.npz", arr_0=np.zeros((2500, 32, 32), np.uint8), arr_1=np.zeros(2500, np.int64))
    sampled = ["--model", "var-mini", "--num-samples", "3", "--output", "s.npz"]
    sample.main(sampled)
    config = {"format": 1, "kind": "a run", "options": {"seed": 1, "max_steps": 3, "model": "var-mini"}}
    (folder / "run/state/step-2").mkdir(parents=True)
    (folder / "run/config.json").write_text(json.dumps(config))
    for place in ("begun/progress", "made"):
        (folder / place).mkdir(parents=True)
        (folder / place / "header.json").write_text(
            json.dumps({"format": 1, "kind": "finished codes", "crops": 1})
        )
    for start, count in ((0, 1024), (2048, 452)):
        np.save(folder / f"begun/progress/{start:08d}.npy", np.zeros((count, 1, 64), np.uint16))
    unfinished = folder / "parts.npz.parts"
    unfinished.mkdir()
    (unfinished / "options.json").write_text(
        json.dumps({"format": 1, "kind": "samples", "options": {"num_samples": 300, "seed": 0}})
    )
    np.save(unfinished / "00000256.npy", np.zeros((44, 32, 32, 3), np.uint8))
    before = snapshot(folder)
    for main, options, row in (
        (sample.main, sampled, "finished   s.npz is there already, with these options"),
        (
            sample.main,
            [*sampled[:2], "--num-samples", "300", "--output", "parts.npz"],
            "resumes    with the 44 of 300 images that are stored",
        ),
        (train_var_cca.main, [*TRAIN, "1", "--output", "run"], "resumes    after step 2 of 3"),
        (extract_codes.main, [*CODES, "begun"], "resumes    with the 1,476 of 2,500 images that are stored"),
        (extract_codes.main, [*CODES, "made"], "finished   made is there already, with these options"),
    ):
        main([*options, "--dry-run"])
        assert row in capsys.readouterr().out.splitlines()
    (folder / "made/header.json").write_text(json.dumps({"format": 1, "kind": "finished codes", "crops": 10}))
    before |= snapshot(folder)
    for main, options, message in (
        (sample.main, [*sampled, "--seed", "1"], "s.npz holds samples with seed 0 instead of 1"),
        (sample.main, [*sampled[:2], "--output", "parts.npz"], "num_samples 300 instead of 50000"),
        (
            train_var_cca.main,
            [*TRAIN, "2", "--output", "run"],
            "run holds an unfinished run with seed 1 instead of 2",
        ),
        (extract_codes.main, [*CODES, "made"], "made holds finished codes with crops 10 instead of 1"),
    ):
        for dry in (["--dry-run"], []):
            with pytest.raises(UserError, match=message):
                main([*options, *dry])
            assert not capsys.readouterr().out, "said before a plan"
    assert snapshot(folder) == before


def test_other_options_are_refused_before_download(folder, monkeypatch):
    """Published weights are not downloaded in vain (``folder`` refuses the network)."""
    described = {"format": 1, "kind": "samples", "options": {"num_samples": 3, "model": "var-d16"}}
    (folder / "s.json").write_text(json.dumps(described))
    np.savez(folder / "s.npz", arr_0=np.zeros((3, 256, 256, 3), np.uint8))
    with pytest.raises(UserError, match="s.npz holds samples with num_samples 3 instead of 8"):
        sample.main(["--model", "var-d16", "--num-samples", "8", "--output", "s.npz"])


def test_plan_lists_all_files_of_training(folder, capsys):
    extra = ["--ema", "0.9", "--sample-every", "2", "--keep-states", "3"]
    options = ["--batch-size", "4", "--micro-batch-size", "8", "--save-every", "1", *extra]
    train_var_cca.main([*TRAIN, "0", *options, "--output", "run"])
    planned = re.search(
        r"^writes +run/: (.*) \(~(\d+) MB each, up to 4 at a time\)$", capsys.readouterr().out, re.M
    )
    assert set(planned[1].split(", ")) == {path.name for path in (folder / "run").iterdir()}
    states = list((folder / "run/state").iterdir())
    assert len(states) == 3
    size = sum(file.stat().st_size for file in states[0].iterdir())
    assert abs(size / 1e6 - int(planned[2])) < 1  # the plan is rounded and leaves out torch's metadata


def test_plan_names_checkpoint_of_run(folder, capsys):
    state = folder / "run/state/step-2"
    state.mkdir(parents=True)
    (state / ".metadata").touch()
    for given, shown in (
        ("run", "run: run/state/step-2"),
        ("run/state/step-2", "run/state/step-2"),
        ("run/state/step-2:ema", "run/state/step-2:ema"),
    ):
        sample.main(["--model", "var-mini", "--weights", given, "--output", "s.npz", "--dry-run"])
        assert capsys.readouterr().out.splitlines()[1].startswith(f"weights    {shown}, sha256 ")


@pytest.mark.parametrize("given", ["run", "run/state/step-2", "run/state/step-2:ema", "done"])
def test_run_of_another_model_is_refused(given, folder):
    state = folder / "run/state/step-2"
    state.mkdir(parents=True)
    (state / ".metadata").touch()
    (folder / "done").mkdir()
    (folder / "done/model.pth").touch()
    for run in ("run", "done"):
        (folder / run / "config.json").write_text('{"format": 1, "options": {"model": "var-d16"}}')
    with pytest.raises(UserError, match=f"--weights: {given} is a run of var-d16, not of var-mini"):
        sample.main(["--model", "var-mini", "--weights", given, "--output", "s.npz", "--dry-run"])


def test_control_characters_are_escaped(folder, capsys):
    sample.main(["--model", "var-mini", "--output", "two\nlines \033[31m.npz", "--dry-run"])
    assert (
        r"writes     two\nlines \x1b[31m.npz (~154 MB), two\nlines \x1b[31m.json" in capsys.readouterr().out
    )


def test_plan_of_training(folder, capsys):
    """The plan contains the hash of the weights, and a micro-batch no larger than the batch."""
    train_var_cca.main([*TRAIN[:4], "--micro-batch-size", "128", "--output", "r", "--dry-run"])
    out = capsys.readouterr().out
    assert "weights    base: assets/var-mini.safetensors, sha256 fb6ee1ebe220" in out
    assert "312 of 64 images (2 epochs), seed 0" in out and "downloads" not in out
    assert "a micro-batch of 64 images\n" in out


def test_command_is_recorded(folder, monkeypatch):
    """The recorded command is quoted, so that it can be pasted into a shell."""
    sample.main(["--model", "var-mini", "--num-samples", "3", "--output", "a sample.npz"])
    assert json.loads((folder / "a sample.json").read_text())["command"] == (
        "python sample.py --model var-mini --num-samples 3 --output 'a sample.npz'"
    )
    given = ["--features", "mini", "--samples", "d16-cca.npz", "--reference", "d16-cca.npz"]
    eval_fid.main([*given, "--metrics", "fid", "--output", "r.json"])
    command = json.loads((folder / "r.json").read_text())["command"]
    assert command.startswith("python eval_fid.py --features mini --samples d16-cca.npz ")
