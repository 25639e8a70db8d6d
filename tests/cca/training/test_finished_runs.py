"""Run folders of finished, unfinished and running runs, and folders that hold files of others."""

import os
import re
import shutil

import pytest
from commands import TRAIN, call, content, metrics
from specimens import tokenizer, weights

import cca.training.curves
import cca.training.loop
import cca.training.run_folder
import cca.training.setup
import sample
import train_var_cca
from cca.cli.compilation import decide_compile
from cca.cli.output import Output, OutputStatus
from cca.distributed import Ranks
from cca.training.run_folder import RunFolder
from models.utils.errors import UserError
from models.utils.files import read_json
from scripts import extract_codes


def train(*options, steps=4):
    fixed = ["--data", "few.npz", "--max-steps", str(steps), "--save-every", "2", "--output", "run"]
    train_var_cca.main([*weights("var"), *fixed, *options])


def fail(*_):
    raise ValueError("nonsense is no backend\nof matplotlib")


def refuse(*_):
    raise UserError("it may not be removed")


def read_files(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_rerun_draws_missing_curves(disk, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(cca.training.curves, "draw_curves", fail)
        train()
    assert capsys.readouterr().err.count("warning: ") == 1
    before = read_files(disk / "run")
    assert (disk / "run/model.pth").exists() and not (disk / "run/curves.png").exists()
    train()
    after = read_files(disk / "run")
    assert after.pop((disk / "run/curves.png").relative_to(disk / "run")) and after == before


def test_unknown_matplotlib_backend_is_a_warning(tmp_path):
    common = ["train_var_cca.py", "--model", "var-mini", "--data", TRAIN, "--batch-size", 8]
    result = call([*common, "--max-steps", 1, "--output", tmp_path], MPLBACKEND="nonsense")
    assert result.returncode == 0 and result.stderr.count("warning: ") == 1
    assert (tmp_path / "model.pth").exists()


def test_run_finishes_if_optional_files_fail(disk, monkeypatch, capsys):
    Output.run(disk / "run", "model.pth").begin({"options": {}})  # an earlier start that saved nothing
    (disk / "run/samples").write_text("mine")
    monkeypatch.setattr(cca.training.run_folder, "remove_folder", refuse)
    train("--sample-every", "2")
    printed = capsys.readouterr().err
    assert "no sample grid step-000002.png: " in printed and "warning: an old checkpoint" in printed
    assert (disk / "run/model.pth").exists() and (disk / "run/samples").read_text() == "mine"


@pytest.mark.parametrize("without", ["state", "metrics.jsonl"])
def test_finished_run_tolerates_missing_files(without, disk):
    train()
    path = disk / "run" / without
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = read_files(disk / "run")
    train()
    with pytest.raises(UserError, match="holds a run with .*beta 0.1 instead of 0.2"):
        train("--beta", "0.2")
    assert read_files(disk / "run") == before


def test_run_without_checkpoint_accepts_new_options(disk, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", refuse)
        with pytest.raises(UserError):
            train("--sample-every", "1", "--beta", "0.3")
    assert len(metrics(disk / "run")) == 2 and (disk / "run/samples/step-000001.png").exists()
    events = set(os.listdir(disk / "run/tensorboard"))
    train("--beta", "0.2", steps=3)
    assert read_json(disk / "run/config.json")["options"]["beta"] == 0.2
    assert [row["step"] for row in metrics(disk / "run")] == [1, 2, 3]
    assert not (disk / "run/samples").exists() and not events & set(os.listdir(disk / "run/tensorboard"))


@pytest.mark.parametrize("name", ["samples", "tensorboard", "metrics.jsonl", "curves.png"])
def test_files_of_others_are_not_changed(name, disk):
    """A user may pass a folder of other samples as ``--output`` by mistake."""
    place = disk / "run" / name
    if "." in name:
        place.parent.mkdir()
        place.write_text("mine")
    else:
        place.mkdir(parents=True)
        (place / "0.png").write_text("mine")
    before = read_files(disk / "run")
    with pytest.raises(UserError, match=f"--output: run/{name} exists, but no file beside it"):
        train()
    assert read_files(disk / "run") == before


def test_error_in_first_step_leaves_no_folder(disk, monkeypatch):
    monkeypatch.setattr(cca.training.loop, "show", refuse)
    with pytest.raises(UserError, match="it may not be removed"):
        train()
    assert not (disk / "run").exists()


def test_empty_outputs_accept_new_options(disk):
    """Samples and codes whose command stopped before it stored a part can start with other options."""
    outputs = Output.npz(disk / "s.npz", "samples"), Output.codes(disk / "new")
    for output in outputs:
        output.begin({"options": {"model": "another", "seed": 7}})
    sample.main([*weights("var"), "--num-samples", "3", "--seed", "1", "--output", "s.npz"])
    line = [*tokenizer("llamagen"), "--data", "few.npz", "--output", "new"]
    extract_codes.main(line)
    assert read_json(disk / "s.json")["options"]["seed"] == 1
    assert read_json(disk / "new/header.json")["image_size"] == 8


def test_compile_without_a_compiler(disk, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(disk))
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="^--compile: .*compiler .*--no-compile"):
        train("--compile")
    assert not (disk / "run").exists()
    new, unfinished = OutputStatus(), OutputStatus({"options": {"compile": True}})
    assert decide_compile(None, True, new, Ranks()) is False
    assert re.match("note: --compile .*compiler", capsys.readouterr().err)
    assert decide_compile(False, True, new, Ranks()) is False and not capsys.readouterr().err
    with pytest.raises(UserError, match="^--compile: .*compiler"):
        decide_compile(None, False, unfinished, Ranks())
    assert decide_compile(None, False, unfinished._replace(is_finished=True), Ranks())
    monkeypatch.setenv("CXX", shutil.which("true", path="/usr/bin:/bin"))
    assert decide_compile(None, True, new, Ranks()) and decide_compile(None, False, unfinished, Ranks())


def test_resume_keeps_compile_mode(disk, monkeypatch, capsys):
    """The run began in eager mode and resumes where the default is ``--compile``."""
    train(steps=2)
    (disk / "run/model.pth").unlink()
    monkeypatch.setattr(
        cca.training.setup,
        "decide_compile",
        lambda option, default, *rest: decide_compile(option, True, *rest),
    )
    train("--dry-run", steps=2)
    assert "eager" in capsys.readouterr().out
    train("--dry-run", "--output", "new", steps=2)
    assert "compiled" in capsys.readouterr().out


def test_resume_keeps_number_of_checkpoints(disk, monkeypatch):
    save = RunFolder.save
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", lambda self, *args: (save, refuse)[args[1] > 4](self, *args))
        with pytest.raises(UserError):
            train("--keep-states", "3", steps=8)
    train(steps=8)
    assert sorted(os.listdir(disk / "run/state")) == ["step-4", "step-6", "step-8"]


def test_model_of_others_is_not_overwritten(disk):
    (disk / "run").mkdir()
    (disk / "run/model.pth").write_bytes(b"of others")
    with pytest.raises(UserError, match="^--output: run/model.pth exists, but no file"):
        train()
    assert content(disk / "run") == {"model.pth": b"of others"}


def test_lock_refuses_second_run(tmp_path, monkeypatch):
    """The second run is a process of its own: a POSIX lock does not refuse the process that holds it."""
    line = ["--model", "var-mini", "--data", TRAIN, "--batch-size", "8", "--max-steps", "2"]
    line += ["--output", str(tmp_path / "run")]
    results, show = [], cca.training.loop.show

    def start_second_run(*arguments):
        if not results:
            results.append(call(["train_var_cca.py", *line]))
        show(*arguments)

    monkeypatch.setattr(cca.training.loop, "show", start_second_run)
    train_var_cca.main(line)
    assert results[0].returncode == 2 and results[0].stderr.count("error: ") == 1
    assert f"is being written by process {os.getpid()} on " in results[0].stderr
    assert len(metrics(tmp_path / "run")) == 2 and (tmp_path / "run/model.pth").exists()
