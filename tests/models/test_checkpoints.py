"""Weights files: every layout that occurs, and every way a file can be wrong."""

import argparse
import pickle
import warnings

import numpy as np
import pytest
import torch
from golden_models import build
from safetensors.torch import save_file

from models.checkpoints import is_constant, load_weights, read_state_dict, save_published
from models.errors import UserError
from scripts import convert_weights


@pytest.fixture(scope="module")
def model():
    return build("var_tiny_a")


def wrapped(state, layout):
    return {
        "bare": state,
        "model": {"model": state, "args": argparse.Namespace(lr=1e-4), "steps": 3},
        "module": {"module": state},
        "state_dict": {"state_dict": state},
        "trainer": {"epoch": 1, "trainer": {"var_wo_ddp": state}},
        "prefixed": {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}},
    }[layout]


@pytest.mark.parametrize("constants", [True, False])
@pytest.mark.parametrize("layout", ["bare", "model", "module", "state_dict", "trainer", "prefixed"])
def test_layouts(model, tmp_path, layout, constants):
    state = {k: v for k, v in model.transformer.state_dict().items() if constants or not is_constant(k)}
    torch.save(wrapped({**state, "freqs_cis": torch.zeros(3)}, layout), tmp_path / "weights.bin")
    other = build("var_tiny_a")
    torch.nn.init.zeros_(other.transformer.head.weight)
    load_weights(other.transformer, tmp_path / "weights.bin", "it")
    assert all(
        torch.equal(a, b)
        for a, b in zip(other.transformer.state_dict().values(), model.transformer.state_dict().values())
    )


def test_safetensors_under_any_name(model, tmp_path):
    save_file(model.transformer.state_dict(), tmp_path / "weights.pth")
    assert torch.equal(read_state_dict(tmp_path / "weights.pth")["pos_1LC"], model.transformer.pos_1LC)


@pytest.mark.parametrize("name, wrapper", [("var_tiny_a", None), ("llamagen_tiny_vq8", "model")])
def test_export_is_in_the_published_format(tmp_path, name, wrapper):
    model = build(name)
    save_published(model.transformer.state_dict(), tmp_path / "out.pt", model.checkpoint_key)
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    content = content[wrapper] if wrapper else content
    assert content.keys() == model.transformer.state_dict().keys()
    assert [p.name for p in tmp_path.iterdir()] == ["out.pt"]


class Hostile:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.fixture(scope="module")
def broken(model, tmp_path_factory):
    folder, state = tmp_path_factory.mktemp("broken"), model.transformer.state_dict()
    torch.save(state, folder / "good.pth")
    data = (folder / "good.pth").read_bytes()
    (folder / "truncated.pth").write_bytes(data[: len(data) // 2])
    save_file(state, folder / "good.safetensors")
    (folder / "truncated.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:5000])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "junk.pt").write_bytes(bytes(range(256)) * 8)
    (folder / "text.pt").write_text("not weights at all")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"epoch": 3}, folder / "nothing.pt")
    torch.save({0: torch.zeros(1)}, folder / "numbers.pt")
    torch.save({**state, "head.weight": state["head.weight"].to_sparse()}, folder / "sparse.pt")
    torch.save({**state, "head.weight": state["head.weight"].to("meta")}, folder / "meta.pt")
    torch.save({**state, "head.weight": state["head.weight"].to(torch.int8)}, folder / "integers.pt")
    np.savez(folder / "arrays.npz", a=np.zeros(3))
    torch.save({"model": state, "extra": Hostile()}, folder / "hostile.pt")
    torch.save({"model": state, "args": argparse.Namespace(lr=Hostile())}, folder / "hostile-namespace.pt")
    torch.save(
        {"model": state, "extra": Hostile()},
        folder / "hostile-legacy.pt",
        _use_new_zipfile_serialization=False,
    )
    (folder / "hostile-pickle2.pt").write_bytes(pickle.dumps(Hostile(), protocol=2))
    (folder / "hostile-pickle4.pt").write_bytes(pickle.dumps(Hostile(), protocol=4))
    torch.save({**state, "surprise": torch.zeros(1)}, folder / "unexpected.pt")
    torch.save({k: v for k, v in state.items() if k != "head.bias"}, folder / "missing.pt")
    torch.save({**state, "head.bias": torch.zeros(3)}, folder / "shape.pt")
    return folder


@pytest.mark.parametrize(
    "name, message",
    [
        ("absent.pt", "no such file"),
        (".", "is a folder"),
        ("truncated.pth", "or truncated"),
        ("truncated.safetensors", "or truncated"),
        ("empty.pt", "not a weights file"),
        ("junk.pt", "not a weights file"),
        ("text.pt", "not a weights file"),
        ("list.pt", "holds a list"),
        ("nothing.pt", "no state dict; its entries are epoch"),
        ("numbers.pt", "no state dict; its entries are 0"),
        ("sparse.pt", "no state dict"),
        ("meta.pt", "no state dict"),
        ("integers.pt", "1 wrongly typed .head.weight torch.int8."),
        ("arrays.npz", "not a weights file"),
        ("hostile.pt", "executable content"),
        ("hostile-namespace.pt", "executable content"),
        ("hostile-legacy.pt", "executable content"),
        ("hostile-pickle2.pt", "executable content"),
        ("hostile-pickle4.pt", "not a weights file"),
        ("unexpected.pt", "1 unexpected .surprise."),
        ("missing.pt", "1 missing .head.bias."),
        ("shape.pt", r"head.bias \[3\] instead of \[64\]"),
    ],
)
def test_bad_files(broken, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(action="error"), pytest.raises(UserError, match=message) as caught:
        load_weights(build("var_tiny_a").transformer, broken / name, "var-tiny")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name, layout", [("var_tiny_a", "bare"), ("llamagen_tiny_vq8", "model"), ("llamagen_tiny_vq8", "bare")]
)
def test_conversion_is_lossless(tmp_path, name, layout):
    original = wrapped(build(name).transformer.half().state_dict(), layout)
    torch.save(original, tmp_path / "a.pt")
    convert_weights.main([str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors")])
    convert_weights.main([str(tmp_path / "b.safetensors"), str(tmp_path / "c.pt")])
    back = torch.load(tmp_path / "c.pt", weights_only=True)
    before, after = (content.get("model", content) for content in (original, back))
    assert ("model" in back) == ("model" in original) and before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before)


def test_conversion_publishes_training_checkpoints(model, tmp_path):
    torch.save(wrapped(model.transformer.state_dict(), "trainer"), tmp_path / "ar-ckpt-last.pth")
    convert_weights.main([str(tmp_path / "ar-ckpt-last.pth"), str(tmp_path / "model.pth")])
    assert (
        torch.load(tmp_path / "model.pth", weights_only=True).keys() == model.transformer.state_dict().keys()
    )
