"""Weights files: every layout that occurs, and every way a file can be wrong."""

import argparse
import collections
import datetime
import json
import os
import pathlib
import pickle
import shutil
import warnings
import zipfile

import numpy as np
import pytest
import torch
from golden_models import build
from safetensors.torch import save_file

from models.checkpoints import read_state_dict, weights_sha256
from models.errors import UserError
from models.weights import is_constant, load_weights
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


OTHER_CONTENT = {
    "numpy.float64": np.float64(1.5),
    "numpy.bool": np.bool_(True),
    "numpy.complex64": np.complex64(1j),
    "numpy.dtype": np.dtype("f4"),
    "counter": collections.Counter("aab"),
}
REFUSED_CONTENT = {
    "pathlib.PurePosixPath": pathlib.PurePosixPath("a"),
    "collections.defaultdict": collections.defaultdict(int, a=1),
    "_reconstruct": np.random.RandomState(0).get_state(),
    "numpy.dtypes.VoidDType": np.dtype([("a", "f4")]),
    "datetime.date": datetime.date(2024, 1, 1),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", OTHER_CONTENT)
def test_plain_content_beside_the_tensors(model, tmp_path, name, zipped):
    state = model.transformer.state_dict()
    content = {"model": state, "optimizer": {"best": [OTHER_CONTENT[name]]}}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert read_state_dict(tmp_path / "w.pt").keys() == state.keys()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", REFUSED_CONTENT)
def test_other_content_is_named(model, tmp_path, name, zipped):
    content = {"model": model.transformer.state_dict(), "extra": REFUSED_CONTENT[name]}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=f"it holds [a-z_.]*{name}.*weights_only=False"):
        read_state_dict(tmp_path / "w.pt")


def test_files_that_hold_themselves(tmp_path):
    for key in ("model", "trainer"):
        content = {}
        content[key] = content
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(UserError, match=f"no state dict; its entries are {key}"):
            read_state_dict(tmp_path / "w.pt")


def test_tensors_larger_than_their_file(tmp_path):
    number = torch.zeros(1)
    cases = ({"a": number.expand(2**20, 2**20)}, {f"{i}": number.expand(2**20, 2) for i in range(200)})
    for state in cases:
        torch.save(state, tmp_path / "w.pt")
        with pytest.raises(UserError, match="its tensors would take"):
            read_state_dict(tmp_path / "w.pt")
    torch.save({"mask": number.expand(512, 512), "again": number}, tmp_path / "w.pt")
    assert read_state_dict(tmp_path / "w.pt")["mask"].shape == (512, 512)


def test_a_deflated_file_is_refused(model, tmp_path):
    """Mapped into memory its numbers would be those of the compressed bytes."""
    torch.save(model.transformer.state_dict(), tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as file,
        zipfile.ZipFile(tmp_path / "d.pt", "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for name in file.namelist():
            out.writestr(name, file.read(name))
    with pytest.raises(UserError, match="is compressed inside"):
        read_state_dict(tmp_path / "d.pt")


@pytest.mark.parametrize("layout", ["zip", "legacy", "safetensors"])
def test_damaged_files(model, tmp_path, layout):
    """Each gives a state dict or a UserError, whatever the readers raise."""
    path, state = tmp_path / "w", {k: v for k, v in model.transformer.state_dict().items() if v.numel() < 300}
    if layout == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=layout == "zip")
    whole, random = path.read_bytes(), np.random.default_rng(0)
    messages = []
    for _ in range(300):
        data = bytearray(whole)
        for place in random.integers(len(data), size=4):
            data[place] = random.integers(256)
        data[random.integers(min(len(data), 3000))] ^= 1 << random.integers(8)  # where the structure is
        path.write_bytes(data)
        try:
            read_state_dict(path)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 30 and all(len(m.splitlines()) == 1 and str(path) in m for m in messages)


@pytest.mark.parametrize("inserted", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_prefixes_inside_keys(model, tmp_path, inserted, suffix):
    state = {
        f"module.{inserted}.{key.replace('blocks.0.', f'blocks.0.{inserted}.')}": value.contiguous()
        for key, value in model.transformer.state_dict().items()
    }
    (torch.save if suffix == "pt" else save_file)(state, tmp_path / f"w.{suffix}")
    assert read_state_dict(tmp_path / f"w.{suffix}").keys() == model.transformer.state_dict().keys()


def test_two_tensors_of_one_name(tmp_path):
    torch.save({"a.w": torch.zeros(1), "a._orig_mod.w": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="holds a.w twice, once as a._orig_mod.w"):
        read_state_dict(tmp_path / "w.pt")


@pytest.fixture
def shards(model, tmp_path):
    """A folder with an index and two shards, as the hub's tools write them."""
    state = {k: v.contiguous() for k, v in model.transformer.state_dict().items()}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {key: names[i % 2] for i, key in enumerate(state)}
    for name in names:
        save_file({k: state[k] for k in state if index[k] == name}, tmp_path / name)
    content = {"metadata": {"total_size": 1}, "weight_map": index}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))
    return tmp_path


@pytest.mark.parametrize("given", ["model.safetensors.index.json", "."])
def test_shards(model, shards, given):
    load_weights(other := build("var_tiny_a").transformer, shards / given, "var-tiny")
    state = model.transformer.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    assert weights_sha256(shards / given) == weights_sha256(shards)
    before = weights_sha256(shards)
    shard = shards / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    assert weights_sha256(shards) != before


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"a": "../model-00001-of-00002.safetensors"}, "is no index"),
        ({"a": "/etc/passwd"}, "is no index"),
        ({"a": 3}, "is no index"),
        ([], "is no index"),
        ("text", "is no index"),
        ({"a": "model-00003-of-00003.safetensors"}, "which does not lie beside it"),
        ({"a": "model-00001-of-00002.safetensors"}, "a is not in model-00001"),
        ({"a": "model.safetensors.index.json"}, "not a weights file"),
    ],
)
def test_broken_indexes(shards, weight_map, message):
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        read_state_dict(index)
    shutil.copy(index, shards / "other.safetensors.index.json")
    with pytest.raises(UserError, match="holds 2 "):
        read_state_dict(shards)


def test_a_pipe_is_no_weights_file(tmp_path):
    os.mkfifo(tmp_path / "w.pt")
    with pytest.raises(UserError, match="not a regular file"):
        read_state_dict(tmp_path / "w.pt")
