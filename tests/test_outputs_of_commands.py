"""Outputs that cannot be written or would overwrite an input are refused in one line before the work."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from made_data import bundled

import eval_fid
import sample
import train_var_cca
from cca.cli.main import run_command
from models.utils.errors import UserError
from scripts import convert_weights, extract_codes, make_reference, reconstruct

SAMPLE = ["--model", "var-mini", "--num-samples", "5", "--output"]
VAR = ["--model", "var-mini", "--data", "good.npz", "--output"]
CODES = ["--model", "llamagen-mini", "--data", "good.npz", "--output"]
EVAL = ["--features", "mini", "--samples", "good.npz", "--reference", "other.npz", "--output"]
RECONSTRUCTED = ["--model", "var-mini", "--images", "good.npz", "--output"]
REFERENCES = ["--features", "mini", "--images", "good.npz", "--output"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    for name in ("good.npz", "other.npz"):
        np.savez(name, **bundled(20))
    (tmp_path / "link.npz").symlink_to("good.npz")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


CASES = [
    (eval_fid, [*EVAL, "good.npz"], "--output: good.npz is what --samples reads"),
    (eval_fid, [*EVAL, "./other.npz"], "--output: other.npz is what --reference reads"),
    (eval_fid, [*EVAL, "link.npz"], "--output: link.npz is what --samples reads"),
    (eval_fid, [*EVAL, "folder.npz"], "expected a file"),
    (eval_fid, [*EVAL, "file/r.json"], "file is not a folder"),
    (make_reference, [*REFERENCES, "good.npz"], "--output: good.npz is what --images reads"),
    (make_reference, [*REFERENCES, "folder.npz"], "expected a file"),
    (
        convert_weights,
        ["assets/var-mini.safetensors", "assets/var-mini.safetensors"],
        "output: assets/var-mini.safetensors is what input reads",
    ),
    (convert_weights, ["good.npz", "w.pth"], "good.npz: not a weights file"),
    (reconstruct, [*RECONSTRUCTED, "./good.npz"], "--output: good.npz is what --images reads"),
    (reconstruct, [*RECONSTRUCTED, "r.png"], "--output: r.png does not end in .npz"),
    (reconstruct, [*RECONSTRUCTED, "folder.npz"], "expected a file"),
    (reconstruct, [*RECONSTRUCTED, "/proc/none/r.npz"], "--output: /proc/none/r.npz cannot be written"),
    (sample, [*SAMPLE, "folder.npz"], "expected a file"),
    (sample, [*SAMPLE, "file/s.npz"], "file is not a folder"),
    (sample, [*SAMPLE, "n" * 240 + ".npz"], "--output: the name has more than"),
    (sample, [*SAMPLE, "n" * 300 + "/s.npz"], "File name too long"),
    (sample, [*SAMPLE, "/proc/none/s.npz"], "--output: /proc/none/s.npz cannot be written"),
    (sample, [*SAMPLE, "s.npz", "--grid", "file/g.png"], "--grid: file/g.png cannot be written"),
    (sample, [*SAMPLE[:2], "--output", "new/s.npz", "--num-samples", str(10**9)], "GB free, the run needs"),
    (train_var_cca, [*VAR, "file"], "expected a folder"),
    (train_var_cca, [*VAR, "good.npz"], "good.npz cannot be written (it is a file"),
    (extract_codes, [*CODES, "file/codes"], "file is not a folder"),
    (extract_codes, [*CODES, "/proc/none"], "--output: /proc/none cannot be written"),
]


@pytest.mark.parametrize("module, arguments, message", CASES, ids=lambda value: None)
def test_bad_output_is_refused(folder, capsys, module, arguments, message):
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: module.main(arguments))
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert not out or "/proc" in message, "it comes before the plan, where it can be foreseen"
    assert caught.value.code == 2 and line.startswith("error: ") and message in line
    assert sorted(folder.rglob("*")) == before


def test_convert_weights_replaces_no_file(folder):
    """It does not even replace its own output, because no file beside it records who wrote it."""
    command = [str(ROOT / "assets/var-mini.safetensors"), "w.pth"]
    convert_weights.main(command)
    made = Path("w.pth").read_bytes()
    Path("own.pt").write_bytes(b"somebody's")
    for output in ("w.pth", "own.pt"):
        with pytest.raises(UserError, match=f"output: {output} exists, but no file beside it"):
            convert_weights.main([command[0], output])
    assert Path("w.pth").read_bytes() == made and Path("own.pt").read_bytes() == b"somebody's"


def test_evaluator_runs_without_cache(folder, monkeypatch, capsys):
    command = ["--features", "mini", "--samples", "good.npz", "--reference", "other.npz", "--metrics", "fid"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))
    eval_fid.main([*command, "--output", "first.json"])
    assert "warning: the reference's features are not cached" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    eval_fid.main([*command, "--output", "second.json"])
    (kept,) = (folder / "cache" / "cca-evaluator").glob("*.npz")
    whole = kept.read_bytes()
    for name, damage in (("third", b"junk"), ("fourth", whole[: len(whole) // 2])):
        kept.write_bytes(damage)
        eval_fid.main([*command, "--output", f"{name}.json"])
        assert len(kept.read_bytes()) == len(whole)
    shutil.rmtree(folder / "cache")
