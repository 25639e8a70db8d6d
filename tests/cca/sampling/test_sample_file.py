"""Sample files: stop signals and resuming, damaged parts, refused outputs, and full disks."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from commands import after_plan, call
from limits import largest_file

import sample
from cca.sampling.sampler import Sampler
from models.utils.errors import UserError
from models.zoo.checkpoint_formats import read_state_dict, save_published

PART = 16  # images, instead of 256


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(sample, "PART_IMAGES", PART)


def make(path, *options, samples=40):
    fixed = ["--model", "var-mini", "--num-samples", str(samples), "--batch-size", str(PART)]
    sample.main([*fixed, "--output", str(path), *options])


def signal_after(monkeypatch, parts, number=signal.SIGTERM, times=1):
    """Patch the sampler to send signals to this process after ``parts`` parts; a part is one batch."""
    original, batches = Sampler.tokens, []

    def tokens_with_signal(self, indices):
        batches.append(indices)
        if len(batches) == parts + 1:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(self, indices)

    monkeypatch.setattr(Sampler, "tokens", tokens_with_signal)


@pytest.mark.parametrize(
    "number, times", [(signal.SIGTERM, 1), (signal.SIGINT, 2), (signal.SIGHUP, 1)], ids=str
)
def test_signal_stops_and_keeps_finished_parts(number, times, tmp_path, monkeypatch, capsys):
    path, before = tmp_path / "s.npz", signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_after(patch, 1, number, times)
        make(path)
    assert after_plan(capsys.readouterr().out) == (
        "stopped; 16 of 40 images are stored, repeat the command to resume\n"
    )
    assert os.listdir(tmp_path) == ["s.npz.parts"] and signal.getsignal(number) == before
    make(path)
    assert json.loads((tmp_path / "s.json").read_text())["images_made_by_this_run"] == 24
    make(tmp_path / "whole.npz")
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["s.json", "s.npz", "whole.json", "whole.npz"]


def test_signal_while_a_part_is_decoded_keeps_it(tmp_path, monkeypatch, capsys):
    decode, counts = Sampler.decode, []

    def decode_with_signal(self, tokens):
        counts.append(len(tokens))
        if sum(counts) == 2 * PART:
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(self, tokens)

    monkeypatch.setattr(Sampler, "decode", decode_with_signal)
    make(tmp_path / "s.npz")
    assert "stopped; 32 of 40 images are stored" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["00000000.npy", "thesis.txt"])
def test_parts_without_a_marker_are_refused(name, tmp_path):
    (tmp_path / "s.npz.parts").mkdir()
    (tmp_path / "s.npz.parts" / name).touch()
    with pytest.raises(UserError, match=rf"s\.npz\.parts holds {name} but no options"):
        make(tmp_path / "s.npz")
    assert [*tmp_path.rglob("*.*")] == [tmp_path / "s.npz.parts", tmp_path / "s.npz.parts" / name]


def test_damaged_part_is_sampled_again(tmp_path, monkeypatch):
    path = tmp_path / "s.npz"
    with monkeypatch.context() as patch:
        signal_after(patch, 2)
        make(path)
    first, second = sorted((tmp_path / "s.npz.parts").glob("*.npy"))
    first.write_bytes(first.read_bytes()[:-5])
    with pytest.raises(UserError, match="unfinished run with seed 0 instead of 5"):
        make(path, "--seed", "5")
    content = second.read_bytes()
    make(path)
    assert json.loads((tmp_path / "s.json").read_text())["images_made_by_this_run"] == 24
    assert np.load(path)["arr_0"][PART : 2 * PART].tobytes() == content[128:]


def test_finished_file(tmp_path, capsys):
    path = tmp_path / "s.npz"
    make(path, "--grid", str(tmp_path / "g.png"), samples=5)
    before = {p.name: (p.read_bytes(), p.stat().st_ino) for p in tmp_path.iterdir()}
    capsys.readouterr()
    # Weights are compared by content, not by path.
    make(path, "--batch-size", "2", "--weights", "assets/var-mini.safetensors", samples=5)
    assert after_plan(capsys.readouterr().out) == (
        f"{path} is finished already, with these options; nothing is left to do\n"
    )
    with pytest.raises(UserError, match="holds samples with seed 0 instead of 1"):
        make(path, "--seed", "1", samples=5)
    assert {p.name: (p.read_bytes(), p.stat().st_ino) for p in tmp_path.iterdir()} == before
    path.unlink()
    make(path, "--seed", "1", samples=5)  # the description of a removed file does not matter
    assert json.loads((tmp_path / "s.json").read_text())["options"]["seed"] == 1
    damaged = before["s.npz"][0].replace(b"(5, 32, 32, 3)", b"((((((((((((((")
    for content in (Path("assets/fashion-mnist-test-10k.npz").read_bytes(), damaged):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is not what s\.json describes; remove it"):
            make(path, "--seed", "1", samples=5)


def test_other_files_are_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    (tmp_path / "data.npz").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"config\.json: holds format None"):
        make(tmp_path / "config.npz")
    with pytest.raises(UserError, match=r"data\.npz exists, but no file beside it"):
        make(tmp_path / "data.npz")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "data.npz"]


def test_nonfinite_logits_leave_no_files(tmp_path):
    """The user then needs another ``--dtype``; files of the failed run would make the command refuse it."""
    state = read_state_dict("assets/llamagen-mini.safetensors")
    save_published({**state, "output.weight": state["output.weight"].float() * 1e7}, tmp_path / "w.pt")
    model = ["--model", "llamagen-mini", "--weights", str(tmp_path / "w.pt")]
    message = "--dtype: the logits of 5 of 5 images are not finite; float16 overflow is the likely cause"
    with pytest.raises(UserError, match=message):
        make(tmp_path / "new" / "s.npz", *model, "--dtype", "float16", samples=5)
    assert os.listdir(tmp_path) == ["w.pt"]
    make(tmp_path / "new" / "s.npz", *model, samples=5)


def test_full_disk(tmp_path):
    path = tmp_path / "s.npz"
    with largest_file(80_000), pytest.raises(UserError, match=r"s\.npz: cannot be written .File too large"):
        make(path)
    assert os.listdir(tmp_path / "s.npz.parts") and not path.exists()
    make(path)
    assert sorted(os.listdir(tmp_path)) == ["s.json", "s.npz"]


FULL_ON_RANK_1 = """
import os, resource, sample
from cca.cli.main import run_command
sample.PART_IMAGES = 16
if os.environ["RANK"] == "1":  # one part is 49,280 bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
run_command(sample.main)
"""


def test_full_disk_of_one_rank(tmp_path):
    """The error of rank 1 ends all ranks; no part of rank 1 is stored, and those of rank 0 are complete."""
    (tmp_path / "full.py").write_text(FULL_ON_RANK_1)
    path, fixed = tmp_path / "s.npz", ["--model", "var-mini", "--num-samples", 120, "--batch-size", PART]
    result = call([tmp_path / "full.py", *fixed, "--output", path], 2, PYTHONPATH=".")
    (error,) = re.findall("error: .*", result.stderr)  # after the progress bar
    assert result.returncode != 0 and "00000064.npy: cannot be written" in error
    stored = {file.name: file.stat().st_size for file in (tmp_path / "s.npz.parts").iterdir()}
    assert stored.pop("options.json") and not path.exists()
    assert stored and set(stored.values()) == {49_280} and max(stored) < "00000064.npy"
    make(path, samples=120)
    make(tmp_path / "whole.npz", samples=120)
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()
