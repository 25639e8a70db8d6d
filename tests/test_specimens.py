"""What earlier versions left on disk goes on where it stopped, or is refused in one line."""

import json

import numpy as np
import pytest
import torch
from specimens import weights

import sample
import train_llamagen_cca
import train_var_cca
from cca.training.run_folder import renamed
from models.errors import UserError
from scripts import extract_codes


def train(family, *options):
    command = {"var": train_var_cca, "llamagen": train_llamagen_cca}[family]
    data = {"var": "--data=few.npz", "llamagen": "--codes=codes"}[family]
    own = {"var": ["--ema", "0.9"], "llamagen": ["--micro-batch-size", "4"]}[family]
    fixed = ["--max-steps", "4", "--save-every", "2", "--output", f"run-{family}"]
    command.main([*weights(family), data, *fixed, *own, *options])


@pytest.mark.parametrize("family, file", [("var", "model.pth"), ("llamagen", "model.pt")])
def test_run_folder_resumes(disk, family, file, capsys):
    before = (disk / f"run-{family}" / "metrics.jsonl").read_text().splitlines()
    train(family)
    note = f"note: run-{family}/metrics.jsonl: steps up to 2 keep the names of an earlier version"
    assert capsys.readouterr().err.count(note) == 1
    assert (disk / f"run-{family}" / "metrics.jsonl").read_text().splitlines()[:2] == before[:2]
    assert (disk / f"run-{family}" / "curves.png").exists()
    lines, expected = (
        [json.loads(line) for line in (disk / name).read_text().splitlines()]
        for name in (f"run-{family}/metrics.jsonl", f"expected-{family}.jsonl")
    )
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, other in zip(lines, expected):
        del line["images_per_second"], other["images_per_second"]
        if line["step"] > 2:  # logged now, under today's names
            assert line.pop("logps/chosen") < 0 and line.pop("logps/rejected") < 0
            other = renamed(other, 0.1)  # the runs' beta
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
    content = torch.load(disk / f"run-{family}" / file, weights_only=True)
    state = content.get("model", content)
    with np.load(disk / f"expected-{family}.npz") as figures:
        assert {key for key in figures.files if not key.startswith("ema/")} == set(state)
        for key in figures.files:
            if not key.startswith("ema/"):
                np.testing.assert_allclose(state[key].flatten()[:16].numpy(), figures[key], atol=1e-5)
        if family == "var":
            average = torch.load(disk / "run-var" / "model_ema.pth", weights_only=True)
            for key in average:
                found = average[key].flatten()[:16].numpy()
                np.testing.assert_allclose(found, figures[f"ema/{key}"], atol=1e-5)


@pytest.mark.parametrize(
    "option, message",
    [(("--lambda", "5"), "lam 10 instead of 5"), (("--beta", "0.2"), "beta 0.1 instead of 0.2")],
)
def test_run_with_other_options_is_refused(disk, option, message):
    """Every option of config.json is compared under the name that it has there."""
    with pytest.raises(UserError, match=message):
        train("llamagen", *option)


def test_sample_parts_are_taken(disk):
    part = (disk / "samples.npz.parts" / "00000000.npy").read_bytes()
    options = ["--num-samples", "300", "--seed", "3", "--cfg-scale", "2", "--top-k", "8"]
    sample.main([*weights("var"), *options, "--output", "samples.npz"])
    assert json.loads((disk / "samples.json").read_text())["images_made_by_this_run"] == 44
    with np.load(disk / "samples.npz") as found, np.load(disk / "expected-samples.npz") as expected:
        assert found["arr_0"][:256].tobytes() == part[-256 * 8 * 8 * 3 :]
        assert np.array_equal(found["arr_1"], expected["arr_1"])
        assert (found["arr_0"] != expected["arr_0"]).any((1, 2, 3)).sum() <= 1


def test_extraction_goes_on(disk):
    tokenizer = "specimen-llamagen-tokenizer.safetensors"
    arguments = ["--model", "specimen-llamagen", "--tokenizer-weights", tokenizer]
    with torch.no_grad():
        extract_codes.main([*arguments, "--data", "images.npz", "--output", "unfinished-codes"])
    with np.load("expected-codes.npz") as expected:
        assert (np.load("unfinished-codes/codes.npy") != expected["codes"]).mean() < 1e-3
        assert np.array_equal(np.load("unfinished-codes/labels.npy"), expected["labels"])
