"""The comparison of what CCA learned with the direction in which guidance moves."""

import json
import shutil

import numpy as np
import pytest
import torch
from commands import ROOT, TRAIN
from made_data import bundled

import train_var_cca
from cca.data.image_sets import to_uint8_tensor
from models import UserError, load_model
from models.zoo.checkpoint_formats import read_state_dict, save_safetensors
from scripts import learned_direction
from scripts.learned_direction import Comparison, token_logprobs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train for three steps without warmup, so that the model learns something, and return the run."""
    folder = tmp_path_factory.mktemp("run") / "var"
    options = ["--model", "var-mini", "--data", str(ROOT / TRAIN), "--max-steps", "3", "--batch-size", "32"]
    train_var_cca.main([*options, "--warmup", "0", "--output", str(folder)])
    return folder


def test_token_logprobs_sum_to_sequence():
    model, tokens = load_model("llamagen-mini"), torch.randint(512, (3, 64))
    labels = torch.tensor([1, 10, 3])  # 10 is the null class
    with torch.no_grad():
        expected = model.sequence_logprob(labels, tokens)
    torch.testing.assert_close(token_logprobs(model, labels, tokens).sum(1), expected, rtol=1e-5, atol=1e-3)


def test_slope_and_correlation():
    guidance = np.random.default_rng(0).normal(size=(40, 6))
    learned = 2 * guidance
    learned[:, 3:] = -0.5 * guidance[:, 3:] + 1
    comparison = Comparison(learned, guidance, [slice(0, 3), slice(3, 6)])
    assert comparison.fit(slice(0, 3)) == pytest.approx((1, 2))
    assert comparison.fit(slice(3, 6)) == pytest.approx((-1, -0.5))
    assert comparison.mean(True) == pytest.approx(learned[:20].sum(1).mean())


def test_tables_and_picture(run, tmp_path):
    output = tmp_path / "learned.md"
    images = ["--images", str(ROOT / "assets/fashion-mnist-test-10k.npz"), "--num-images", "60"]
    learned_direction.main([str(run), str(run), *images, "--output", str(output)])
    text = output.read_text()
    assert "| var-mini | " in text and "± 0.00" in text and "slope by level" in text
    assert (tmp_path / "learned.png").read_bytes()[:4] == b"\x89PNG"


def test_images_use_the_tokenizer_of_the_run(run, tmp_path, monkeypatch):
    """The run was trained with another tokenizer than the default of its model."""
    tokenizer = read_state_dict(ROOT / "assets/var-mini-tokenizer.safetensors")
    tokenizer = {key: value.roll(1, 0) if "quant" in key else value for key, value in tokenizer.items()}
    save_safetensors(tokenizer, tmp_path / "tokenizer.safetensors")
    data = bundled(60)
    np.savez(tmp_path / "data.npz", **data)
    options = ["--model", "var-mini", "--tokenizer-weights", str(tmp_path / "tokenizer.safetensors")]
    options += ["--data", str(tmp_path / "data.npz"), "--max-steps", "1", "--batch-size", "32"]
    train_var_cca.main([*options, "--output", str(tmp_path / "run")])
    encoders, encode = [], learned_direction.to_tokens
    monkeypatch.setattr(
        learned_direction,
        "to_tokens",
        lambda model, *arguments: encoders.append(model) or encode(model, *arguments),
    )
    images = to_uint8_tensor(data["arr_0"])
    learned_direction.compare(tmp_path / "run", images, torch.from_numpy(data["arr_1"]))
    for key, value in encoders[0].tokenizer.state_dict().items():
        assert torch.equal(value, tokenizer.get(key, value))


def test_invalid_inputs(run, tmp_path):
    np.savez(tmp_path / "bare.npz", arr_0=bundled(4)["arr_0"])
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((4, 64, 64, 3), np.uint8), arr_1=np.arange(4))
    np.savez(tmp_path / "more.npz", arr_0=bundled(4)["arr_0"], arr_1=np.arange(4) + 7)
    output = ["--output", str(tmp_path / "x.md")]
    for arguments, message in (
        ([str(tmp_path), *output], "holds no config.json of a training run"),
        ([str(run), *output, "--images", str(tmp_path / "bare.npz")], r"holds no labels \(arr_1\)"),
        ([str(run), *output, "--images", str(tmp_path / "large.npz")], "64 x 64 pixels; .* needs 32 x 32"),
        ([str(run), *output, "--images", str(tmp_path / "more.npz")], "labels must be in 0 … 9"),
        ([str(run), "--output", str(tmp_path / "x.txt")], "--output: .*x.txt does not end in .md"),
    ):
        with pytest.raises(UserError, match=message):
            learned_direction.main(arguments)
    assert not list(tmp_path.glob("x.*"))
    config = json.loads((run / "config.json").read_text())
    config["options"]["weights_sha256"] = "0" * 64
    shutil.copytree(run, tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its base, base, has changed"):
        learned_direction.main([str(tmp_path / "other"), *output])
