"""What a run folder keeps, mends and refuses; states are damaged and made hostile on purpose."""

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
    """SIGTERM comes in the middle of the step after so many."""
    original = command.show

    def pretend(bar, metrics, refresh):
        if bar.n + 1 == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        original(bar, metrics, refresh)

    monkeypatch.setattr(command, "show", pretend)


@pytest.fixture
def stopped(disk, monkeypatch):
    """A run stopped after five of its six steps, which keeps three states: 2, 4 and 5."""
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train("run", "--keep-states", "3")
    return disk / "run"


@pytest.mark.parametrize("option", [(), ("--micro-batch-size", "2")])
def test_a_run_keeps_its_micro_batch_where_the_default_is_another(option, disk, monkeypatch, capsys):
    """With dropout it decides the masks; the default depends on the device and on this project's version."""
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
    noted = json.loads((disk / "cut/config.json").read_text())
    assert noted["micro_batch_size"] == 4 and "micro_batch_size" not in noted["options"]
    monkeypatch.setitem(TRAINED_IMAGES, "cpu", 8)
    used, said = train("cut", *option)
    assert used == {2 if option else 4}
    assert ("a micro-batch of 4 images as before\n" in said) is not bool(option)
    assert json.loads((disk / "cut/config.json").read_text())["micro_batch_size"] == (2 if option else 4)
    whole, cut = (
        torch.load(disk / name / "model.pt", weights_only=True)["model"] for name in ("whole", "cut")
    )
    assert equal(whole, cut) is not bool(option)


def test_a_size_that_did_not_fit_is_not_kept(stopped, monkeypatch, capsys):
    noted = json.loads((stopped / "config.json").read_text())["micro_batch_size"]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "micro_loss", memory_full)
        with pytest.raises(UserError, match="^--micro-batch-size: .*memory"):
            train("run", "--micro-batch-size", "3")
    capsys.readouterr()
    train("run", "--dry-run")
    assert noted != 3 and f"a micro-batch of {noted} images as before" in capsys.readouterr().out


@pytest.mark.parametrize("note", ["many", 0, 1.5, True, None])
def test_a_note_that_is_no_number_is_refused(note, stopped):
    config = stopped / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "micro_batch_size": note}))
    with pytest.raises(UserError, match=f"config.json: micro_batch_size is {note!r}, "):
        train("run")


def test_states_of_which_nothing_is_known_are_refused(stopped):
    (stopped / "config.json").unlink()
    before = sorted(stopped.iterdir())
    for options in ((), ("--dry-run",)):
        with pytest.raises(UserError, match="^--output: run/state holds step-2 but no config.json"):
            train("run", *options)
    assert sorted(stopped.iterdir()) == before


def exported(folder):
    return torch.load(folder / "model.pth", weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def states(folder):
    return sorted(path.name for path in (folder / "state").iterdir())


@pytest.mark.parametrize("newest", ["step-5", "step-4"])
def test_a_run_goes_on_from_its_newest_state(newest, stopped):
    """Whether it is the one at which it was stopped, or the one before that, where this was deleted."""
    whole = stopped.parent / "whole"
    assert states(stopped) == ["step-2", "step-4", "step-5"]
    if newest == "step-4":
        shutil.rmtree(stopped / "state" / "step-5")
    train("run", "--keep-states", "2")
    train("whole")
    assert states(stopped) == [newest, "step-6"] and states(whole) == ["step-6"]
    assert equal(exported(stopped), exported(whole))
    for folder in (stopped, whole):
        assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4, 5, 6]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forget_checksums(state):
    for path in state.glob("sha256-*"):
        path.unlink()


def hostile(state):
    forget_checksums(state)
    (state / ".metadata").write_bytes(pickle.dumps(Hostile()))


def hostile_item(state):
    """The framework unpickles what is no tensor."""
    forget_checksums(state)
    (file,) = state.glob("*.distcp")
    metadata = pickle.loads((state / ".metadata").read_bytes())
    item = next(v for k, v in metadata.storage_data.items() if k.fqn.endswith("betas"))
    torch.save(Hostile(), state / "item")
    item.relative_path, item.offset, item.length = "item", 0, (state / "item").stat().st_size
    (state / ".metadata").write_bytes(pickle.dumps(metadata))


DAMAGES = {
    "flipped bit": (lambda state: flip(next(state.glob("*.distcp"))), "checksum"),
    "flipped description": (lambda state: flip(state / ".metadata"), "checksum"),
    "missing": (lambda state: next(state.glob("*.distcp")).unlink(), "is missing"),
    "no description": (lambda state: (state / ".metadata").unlink(), ".metadata is missing"),
    "truncated checksums": (lambda state: (state / "sha256-0.json").write_text("{"), "is damaged"),
    "hostile": (hostile, r"it holds (posix|os)\.mkdir"),
    "hostile item": (hostile_item, "is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_state_is_refused_with_what_to_do(kind, stopped):
    damage, message = DAMAGES[kind]
    damage(stopped / "state" / "step-5")
    with pytest.raises(UserError, match=f"step-5.*{message}") as caught:
        train("run")
    assert re.search("delete that folder, .* from step 4$", str(caught.value))
    assert not os.path.exists("executed") and states(stopped) == ["step-2", "step-4", "step-5"]


def test_other_options_are_named_as_config_json_does(stopped):
    for option, message in (
        (("--lambda", "5"), "lam 10 instead of 5"),
        (("--beta", "0.2"), "beta 0.1 instead"),
    ):
        with pytest.raises(UserError, match=message):
            train("run", *option)


def test_metrics_cut_off_are_mended(stopped, capsys):
    path = stopped / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    odd = ["[" * 50_000 + "\n", '{"step": 1e999}\n', '{"step": [1]}\n', "9" * 5000 + "\n", '{"step": -1}\n']
    path.write_text("".join([*odd, *lines[:2], lines[1], *lines[2:4], lines[4][:20]]))  # one twice, one cut
    train("run")
    assert [line["step"] for line in metrics(stopped)] == [1, 2, 3, 4, 6]
    assert "1 of 5 steps have no line" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "[", "[" * 50_000, "[]", "{}", '{"options": []}', '{"options": null}']
)
def test_what_is_no_config_is_refused(content, disk):
    """None of them may be taken for a run with these options, or end in a traceback."""
    (disk / "run-var").mkdir()
    (disk / "run-var" / "config.json").write_text(content)
    before = {path: path.stat().st_mtime_ns for path in disk.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"run-var/config\.json: (is damaged|holds)"):
        train("run-var", steps=4)
    assert {path: path.stat().st_mtime_ns for path in disk.rglob("*") if path.is_file()} == before


def test_what_a_killed_save_left_is_swept(stopped):
    shutil.copytree(stopped / "state" / "step-2", stopped / "state" / ".step-1.removed")
    shutil.copytree(stopped / "state" / "step-2", stopped / "state" / ".writing")
    (stopped / "state" / "step-9-mine").mkdir()
    train("run", "--keep-states", "1")
    assert states(stopped) == ["step-6", "step-9-mine"]


HOLLOW = Metadata.__new__(Metadata)  # a description that lacks its tensors
HOLLOW.__dict__ = {"planner_data": None}
# Of the second, Python would print a line of its own, about a byte array larger than memory.
DESCRIPTIONS = [pickle.dumps(HOLLOW), b"\x80\x05\x96" + (2**50).to_bytes(8, "little") + b"."]


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=["hollow", "large"])
def test_weights_of_a_state_whose_description_is_damaged(description, stopped, capfd):
    """As damage to one without checksums leaves it."""
    state = stopped / "state" / "step-5"
    forget_checksums(state)
    (state / ".metadata").write_bytes(description)
    with pytest.raises(UserError, match="step-5 is damaged"):
        read_checkpoint(state)
    assert capfd.readouterr().err == ""


def test_a_full_disk_is_one_line_at_every_size(disk, capsys):  # what is printed goes to no file
    for size in (100, 2_000, 20_000, 100_000):
        with largest_file(size), pytest.raises(UserError, match="cannot be written .File too large"):
            train("full")
    train("full")
    train("whole")
    assert equal(exported(disk / "full"), exported(disk / "whole"))


def test_two_ranks_say_which_checkpoint_is_damaged(tmp_path):
    """Though each file is checked by one of them."""
    common = ["train_var_cca.py", "--model", "var-mini", "--data", TRAIN, "--batch-size", 4]
    line = [*common, "--max-steps", 2, "--save-every", 1, "--keep-states", 2, "--output", tmp_path / "run"]
    run(*line, processes=2)
    (tmp_path / "run/model.pth").unlink()
    file = max((tmp_path / "run/state/step-2").glob("__*"))
    file.write_bytes(file.read_bytes()[:-1])
    result = call(line, processes=2)
    assert result.returncode != 0 and "step-2 is damaged" in result.stderr, result.stderr
    assert "from step 1\n" in result.stderr and "another rank has ended" not in result.stderr


def test_tensorboard_keeps_every_step(stopped):
    train("run", "--keep-states", "3")
    events = EventAccumulator(str(stopped / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_weights_of_a_run_and_of_its_states(stopped):
    def images(source, name):
        options = ["--weights", str(source), "--num-samples", "8", "--output", f"{name}.npz"]
        sample.main([*weights("var"), *options])
        return Path(f"{name}.npz").read_bytes()

    newest, fifth = images("run", "newest"), images("run/state/step-5", "fifth")
    assert newest == fifth != images("run/state/step-2", "second")
    assert fifth != images("run/state/step-5:ema", "average")
    train("run", "--keep-states", "3")
    last, average = (
        read_checkpoint(stopped / "state" / "step-6"),
        read_checkpoint(stopped / "state" / "step-6", True),
    )
    assert equal(last, exported(stopped)) and not equal(last, average)
    assert images("run", "exported") == images("run/model.pth", "file") == images("run/state/step-6", "last")
    assert images("run:ema", "exported-average") == images("run/model_ema.pth", "average-file")
    with pytest.raises(UserError, match="--weights: codes holds no model.pth"):
        images("codes", "none")
    train_var_cca.main([*weights("var"), "--data=few.npz", "--max-steps=1", "--output=plain"])
    os.remove("plain/model.pth")
    with pytest.raises(UserError, match="holds no average of the weights"):
        images("plain:ema", "none")
    other = ["--model", "var-mini", "--weights", "plain", "--output", "none.npz"]
    os.remove("plain/config.json")  # which says of what model it is
    with pytest.raises(UserError, match="step-1: does not fit var-mini: tensors"):
        sample.main(other)
    assert not os.path.exists("none.npz") and not os.path.exists("none.npz.parts")
