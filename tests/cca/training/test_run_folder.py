"""Run folders: what a resume keeps, repairs and refuses, with damaged and hostile checkpoints."""

import json
import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from commands import TRAIN, call, metrics, run
from limits import largest_file, memory_full
from made_data import Hostile
from specimens import weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.metadata import Metadata

import cca.training.loop as command
import sample
import train_llamagen_cca
import train_var_cca
from cca.training.trainer import Trainer
from models.utils.errors import UserError
from models.utils.precision import TRAINED_IMAGES
from models.zoo.loading import build_model
from models.zoo.run_checkpoints import read_checkpoint


def train(output, *options, steps=6):
    fixed = ["--data", "few.npz", "--max-steps", str(steps), "--save-every", "2", "--ema", "0.9"]
    train_var_cca.main([*weights("var"), *fixed, "--output", str(output), *options])


def stop_after(monkeypatch, steps):
    """Send SIGTERM during step ``steps``, so that the run stops after this step."""
    original = command.show

    def show_and_stop(bar, metrics, refresh):
        if bar.n + 1 == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        original(bar, metrics, refresh)

    monkeypatch.setattr(command, "show", show_and_stop)


@pytest.fixture
def stopped_run(disk, monkeypatch):
    """Folder of a run of six steps that was stopped after five; it keeps checkpoints 2, 4 and 5."""
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train("run", "--keep-states", "3")
    return disk / "run"


@pytest.mark.parametrize("option", [(), ("--micro-batch-size", "2")])
def test_resume_keeps_micro_batch_size(option, disk, monkeypatch, capsys):
    """The micro-batch size decides the dropout masks; its default depends on the device and the version."""
    sizes, own = [], Trainer.micro_loss
    monkeypatch.setattr(
        Trainer, "micro_loss", lambda self, batch: (sizes.append(len(batch)), own(self, batch))[1]
    )

    def train(name, *options):
        sizes.clear()
        fixed = ["--codes", "codes", "--max-steps", "4", "--output", name]
        train_llamagen_cca.main([*weights("llamagen"), *fixed, *options])
        return {*sizes}, capsys.readouterr().out

    assert build_model("specimen-llamagen").stochastic
    monkeypatch.setitem(TRAINED_IMAGES, "cpu", 4)
    assert train("whole")[0] == {4}
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train("cut")[0] == {4}
    config = json.loads((disk / "cut/config.json").read_text())
    assert config["micro_batch_size"] == 4 and "micro_batch_size" not in config["options"]
    monkeypatch.setitem(TRAINED_IMAGES, "cpu", 8)
    used, printed = train("cut", *option)
    assert used == {2 if option else 4}
    assert ("a micro-batch of 4 images as before\n" in printed) is not bool(option)
    assert json.loads((disk / "cut/config.json").read_text())["micro_batch_size"] == (2 if option else 4)
    whole, cut = (
        torch.load(disk / name / "model.pt", weights_only=True)["model"] for name in ("whole", "cut")
    )
    assert are_equal(whole, cut) is not bool(option)


def test_failed_micro_batch_size_is_not_kept(stopped_run, monkeypatch, capsys):
    stored_size = json.loads((stopped_run / "config.json").read_text())["micro_batch_size"]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "micro_loss", memory_full)
        with pytest.raises(UserError, match="^--micro-batch-size: .*memory"):
            train("run", "--micro-batch-size", "3")
    capsys.readouterr()
    train("run", "--dry-run")
    assert stored_size != 3 and f"a micro-batch of {stored_size} images as before" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["many", 0, 1.5, True, None])
def test_invalid_micro_batch_size_in_config_is_refused(size, stopped_run):
    config = stopped_run / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "micro_batch_size": size}))
    with pytest.raises(UserError, match=f"config.json: micro_batch_size is {size!r}, "):
        train("run")


def test_checkpoints_without_config_are_refused(stopped_run):
    (stopped_run / "config.json").unlink()
    before = sorted(stopped_run.iterdir())
    for options in ((), ("--dry-run",)):
        with pytest.raises(UserError, match="^--output: run/state holds step-2 but no config.json"):
            train("run", *options)
    assert sorted(stopped_run.iterdir()) == before


def load_export(folder):
    return torch.load(folder / "model.pth", weights_only=True)


def are_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def list_checkpoints(folder):
    return sorted(path.name for path in (folder / "state").iterdir())


@pytest.mark.parametrize("newest", ["step-5", "step-4"])
def test_resume_starts_from_newest_checkpoint(newest, stopped_run):
    """The newest checkpoint is step 5, or step 4 if step 5 was deleted."""
    whole = stopped_run.parent / "whole"
    assert list_checkpoints(stopped_run) == ["step-2", "step-4", "step-5"]
    if newest == "step-4":
        shutil.rmtree(stopped_run / "state" / "step-5")
    train("run", "--keep-states", "2")
    train("whole")
    assert list_checkpoints(stopped_run) == [newest, "step-6"] and list_checkpoints(whole) == ["step-6"]
    assert are_equal(load_export(stopped_run), load_export(whole))
    for folder in (stopped_run, whole):
        assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4, 5, 6]


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_checksums(state):
    for path in state.glob("sha256-*"):
        path.unlink()


def write_hostile_metadata(state):
    remove_checksums(state)
    (state / ".metadata").write_bytes(pickle.dumps(Hostile()))


def write_hostile_item(state):
    """Replace an entry that is not a tensor. PyTorch unpickles such entries."""
    remove_checksums(state)
    (file,) = state.glob("*.distcp")
    metadata = pickle.loads((state / ".metadata").read_bytes())
    item = next(v for k, v in metadata.storage_data.items() if k.fqn.endswith("betas"))
    torch.save(Hostile(), state / "item")
    item.relative_path, item.offset, item.length = "item", 0, (state / "item").stat().st_size
    (state / ".metadata").write_bytes(pickle.dumps(metadata))


DAMAGES = {
    "flipped bit": (lambda state: flip_bit(next(state.glob("*.distcp"))), "checksum"),
    "flipped description": (lambda state: flip_bit(state / ".metadata"), "checksum"),
    "missing": (lambda state: next(state.glob("*.distcp")).unlink(), "is missing"),
    "no description": (lambda state: (state / ".metadata").unlink(), ".metadata is missing"),
    "truncated checksums": (lambda state: (state / "sha256-0.json").write_text("{"), "is damaged"),
    "hostile": (write_hostile_metadata, r"it holds (posix|os)\.mkdir"),
    "hostile item": (write_hostile_item, "is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoint_is_refused_with_remedy(kind, stopped_run):
    damage, message = DAMAGES[kind]
    damage(stopped_run / "state" / "step-5")
    with pytest.raises(UserError, match=f"step-5.*{message}") as caught:
        train("run")
    assert re.search("delete that folder, .* from step 4$", str(caught.value))
    assert not os.path.exists("executed") and list_checkpoints(stopped_run) == ["step-2", "step-4", "step-5"]


def test_changed_options_are_named_as_in_config(stopped_run):
    for option, message in (
        (("--lambda", "5"), "lam 10 instead of 5"),
        (("--beta", "0.2"), "beta 0.1 instead"),
    ):
        with pytest.raises(UserError, match=message):
            train("run", *option)


def test_resume_repairs_metrics_file(stopped_run, capsys):
    path = stopped_run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    odd = ["[" * 50_000 + "\n", '{"step": 1e999}\n', '{"step": [1]}\n', "9" * 5000 + "\n", '{"step": -1}\n']
    # One line is there twice, and one is cut off.
    path.write_text("".join([*odd, *lines[:2], lines[1], *lines[2:4], lines[4][:20]]))
    train("run")
    assert [line["step"] for line in metrics(stopped_run)] == [1, 2, 3, 4, 6]
    assert "1 of 5 steps have no line" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "[", "[" * 50_000, "[]", "{}", '{"options": []}', '{"options": null}']
)
def test_invalid_config_is_refused(content, disk):
    """An invalid config.json is not taken for a run with these options, and causes no traceback."""
    (disk / "run-var").mkdir()
    (disk / "run-var" / "config.json").write_text(content)
    before = {path: path.stat().st_mtime_ns for path in disk.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"run-var/config\.json: (is damaged|holds)"):
        train("run-var", steps=4)
    assert {path: path.stat().st_mtime_ns for path in disk.rglob("*") if path.is_file()} == before


def test_leftovers_of_killed_save_are_removed(stopped_run):
    shutil.copytree(stopped_run / "state" / "step-2", stopped_run / "state" / ".step-1.removed")
    shutil.copytree(stopped_run / "state" / "step-2", stopped_run / "state" / ".writing")
    (stopped_run / "state" / "step-9-mine").mkdir()
    train("run", "--keep-states", "1")
    assert list_checkpoints(stopped_run) == ["step-6", "step-9-mine"]


HOLLOW = Metadata.__new__(Metadata)  # metadata without tensors
HOLLOW.__dict__ = {"planner_data": None}
# For the second, Python would print a line about a bytearray that is larger than memory.
DESCRIPTIONS = [pickle.dumps(HOLLOW), b"\x80\x05\x96" + (2**50).to_bytes(8, "little") + b"."]


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=["hollow", "large"])
def test_damaged_metadata_without_checksums_is_refused(description, stopped_run, capfd):
    state = stopped_run / "state" / "step-5"
    remove_checksums(state)
    (state / ".metadata").write_bytes(description)
    with pytest.raises(UserError, match="step-5 is damaged"):
        read_checkpoint(state)
    assert capfd.readouterr().err == ""


def test_full_disk_is_one_line_error(disk, capsys):  # capsys keeps output in memory
    for size in (100, 2_000, 20_000, 100_000):
        with largest_file(size), pytest.raises(UserError, match="cannot be written .File too large"):
            train("full")
    train("full")
    train("whole")
    assert are_equal(load_export(disk / "full"), load_export(disk / "whole"))


def test_two_ranks_name_damaged_checkpoint(tmp_path):
    """Each file is checked by one of the two ranks only."""
    common = ["train_var_cca.py", "--model", "var-mini", "--data", TRAIN, "--batch-size", 4]
    line = [*common, "--max-steps", 2, "--save-every", 1, "--keep-states", 2, "--output", tmp_path / "run"]
    run(*line, processes=2)
    (tmp_path / "run/model.pth").unlink()
    file = max((tmp_path / "run/state/step-2").glob("__*"))
    file.write_bytes(file.read_bytes()[:-1])
    result = call(line, processes=2)
    assert result.returncode != 0 and "step-2 is damaged" in result.stderr, result.stderr
    assert "from step 1\n" in result.stderr and "another rank has ended" not in result.stderr


def test_tensorboard_keeps_every_step(stopped_run):
    train("run", "--keep-states", "3")
    events = EventAccumulator(str(stopped_run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_sampling_with_weights_of_run_and_checkpoints(stopped_run):
    def sample_images(source, name):
        options = ["--weights", str(source), "--num-samples", "8", "--output", f"{name}.npz"]
        sample.main([*weights("var"), *options])
        return Path(f"{name}.npz").read_bytes()

    newest, fifth = sample_images("run", "newest"), sample_images("run/state/step-5", "fifth")
    assert newest == fifth != sample_images("run/state/step-2", "second")
    assert fifth != sample_images("run/state/step-5:ema", "average")
    train("run", "--keep-states", "3")
    last, average = (
        read_checkpoint(stopped_run / "state" / "step-6"),
        read_checkpoint(stopped_run / "state" / "step-6", True),
    )
    assert are_equal(last, load_export(stopped_run)) and not are_equal(last, average)
    assert (
        sample_images("run", "exported")
        == sample_images("run/model.pth", "file")
        == sample_images("run/state/step-6", "last")
    )
    assert sample_images("run:ema", "exported-average") == sample_images("run/model_ema.pth", "average-file")
    with pytest.raises(UserError, match="--weights: codes holds no model.pth"):
        sample_images("codes", "none")
    train_var_cca.main([*weights("var"), "--data=few.npz", "--max-steps=1", "--output=plain"])
    os.remove("plain/model.pth")
    with pytest.raises(UserError, match="holds no average of the weights"):
        sample_images("plain:ema", "none")
    other = ["--model", "var-mini", "--weights", "plain", "--output", "none.npz"]
    os.remove("plain/config.json")  # it contains the name of the model
    with pytest.raises(UserError, match="step-1: does not fit var-mini: tensors"):
        sample.main(other)
    assert not os.path.exists("none.npz") and not os.path.exists("none.npz.parts")
