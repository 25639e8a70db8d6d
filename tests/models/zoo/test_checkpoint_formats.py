"""Weights files: their layouts, broken and damaged files, conversion and export."""

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
from made_data import Hostile
from safetensors.torch import save_file

from models.utils.errors import UserError
from models.zoo.checkpoint_formats import (
    is_constant,
    load_weights,
    read_state_dict,
    save_published,
    weights_sha256,
)
from scripts import convert_weights


@pytest.fixture(scope="module")
def model():
    return build("var_tiny_a")


def wrap_state(state, layout):
    """Return the content of a weights file with this layout."""
    return {
        "bare": state,
        "model": {"model": state, "args": argparse.Namespace(lr=1e-4), "steps": 3},
        "module": {"module": state},
        "state_dict": {"state_dict": state},
        "trainer": {"epoch": 1, "trainer": {"var_wo_ddp": state}},
        "compiled": {"model": prefix_keys(state, "_orig_mod")},
        "sharded": {"model": prefix_keys(state, "_fsdp_wrapped_module")},
        "checkpointing": {"model": prefix_keys(state, "_checkpoint_wrapped_module")},
    }[layout]


def prefix_keys(state, inserted):
    """Return the state dict with the keys of a wrapped model whose first block is wrapped as well."""
    return {
        f"module.{inserted}.{key.replace('blocks.0.', f'blocks.0.{inserted}.')}": value
        for key, value in state.items()
    }


LAYOUTS = ["bare", "model", "module", "state_dict", "trainer", "compiled", "sharded", "checkpointing"]


@pytest.mark.parametrize("constants", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(model, tmp_path, layout, constants):
    state = {k: v for k, v in model.transformer.state_dict().items() if constants or not is_constant(k)}
    torch.save(wrap_state({**state, "freqs_cis": torch.zeros(3)}, layout), tmp_path / "weights.bin")
    other = build("var_tiny_a")
    torch.nn.init.zeros_(other.transformer.head.weight)
    load_weights(other.transformer, tmp_path / "weights.bin", "it")
    assert all(
        torch.equal(a, b)
        for a, b in zip(other.transformer.state_dict().values(), model.transformer.state_dict().values())
    )


def test_safetensors_with_another_suffix(model, tmp_path):
    save_file(prefix_keys(model.transformer.state_dict(), "_orig_mod"), tmp_path / "weights.pth")
    assert torch.equal(read_state_dict(tmp_path / "weights.pth")["pos_1LC"], model.transformer.pos_1LC)


@pytest.fixture(scope="module")
def broken_files(model, tmp_path_factory):
    """Write broken weights files and return their folder."""
    folder, state = tmp_path_factory.mktemp("broken"), model.transformer.state_dict()
    head, hostile, number = state["head.weight"], {"model": state, "extra": Hostile()}, torch.zeros(1)
    itself: dict = {}
    itself["trainer"] = itself
    for name, content in {
        "good.pth": state,
        "list.pt": [1, 2],
        "nothing.pt": {"epoch": 3},
        "numbers.pt": {0: number},
        "itself.pt": itself,
        "large.pt": {"a": number.expand(2**20, 2**20)},
        "large-in-all.pt": {f"{i}": number.expand(2**20, 2) for i in range(200)},
        "twice.pt": {"a.w": number, "a._orig_mod.w": number},
        "sparse.pt": {**state, "head.weight": head.to_sparse()},
        "meta.pt": {**state, "head.weight": head.to("meta")},
        "integers.pt": {**state, "head.weight": head.to(torch.int8)},
        "hostile.pt": hostile,
        "hostile-namespace.pt": {"model": state, "args": argparse.Namespace(lr=Hostile())},
        "unexpected.pt": {**state, "surprise": torch.zeros(1)},
        "missing.pt": {k: v for k, v in state.items() if k != "head.bias"},
        "shape.pt": {**state, "head.bias": torch.zeros(3)},
    }.items():
        torch.save(content, folder / name)
    torch.save(hostile, folder / "hostile-legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "good.safetensors")
    np.savez(folder / "arrays.npz", a=np.zeros(3))
    whole = (folder / "good.pth").read_bytes()
    for name, data in {
        "truncated.pth": whole[: len(whole) // 2],
        "truncated.safetensors": (folder / "good.safetensors").read_bytes()[:5000],
        "empty.pt": b"",
        "junk.pt": bytes(range(256)) * 8,
        "text.pt": b"not weights at all",
        "hostile-pickle2.pt": pickle.dumps(Hostile(), protocol=2),
        "hostile-pickle4.pt": pickle.dumps(Hostile(), protocol=4),
    }.items():
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "pipe.pt")
    with (
        zipfile.ZipFile(folder / "good.pth") as file,
        zipfile.ZipFile(folder / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for name in file.namelist():
            out.writestr(name, file.read(name))
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
        ("itself.pt", "no state dict; its entries are trainer"),
        ("large.pt", "its tensors would take"),
        ("large-in-all.pt", "its tensors would take"),
        ("twice.pt", "holds a.w twice, once as a._orig_mod.w"),
        ("pipe.pt", "not a regular file"),
        # If this file were memory-mapped, its tensors would hold compressed bytes.
        ("deflated.pt", "compressed"),
        ("sparse.pt", "no state dict"),
        ("meta.pt", "no state dict"),
        ("integers.pt", "1 wrongly typed .head.weight torch.int8."),
        ("arrays.npz", "not a weights file"),
        ("hostile.pt", "execute code"),
        ("hostile-namespace.pt", "execute code"),
        ("hostile-legacy.pt", "execute code"),
        ("hostile-pickle2.pt", "execute code"),
        ("hostile-pickle4.pt", "not a weights file"),
        ("unexpected.pt", "1 unexpected .surprise."),
        ("missing.pt", "1 missing .head.bias."),
        ("shape.pt", r"head.bias \[3\] instead of \[64\]"),
    ],
)
def test_broken_files_raise(broken_files, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(action="error"), pytest.raises(UserError, match=message) as caught:
        load_weights(build("var_tiny_a").transformer, broken_files / name, "var-tiny")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name, layout", [("var_tiny_a", "bare"), ("llamagen_tiny_vq8", "model"), ("llamagen_tiny_vq8", "bare")]
)
def test_conversion_is_lossless(tmp_path, name, layout):
    original = wrap_state(build(name).transformer.half().state_dict(), layout)
    torch.save(original, tmp_path / "a.pt")
    convert_weights.main([str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors")])
    convert_weights.main([str(tmp_path / "b.safetensors"), str(tmp_path / "c.pt")])
    back = torch.load(tmp_path / "c.pt", weights_only=True)
    before, after = (content.get("model", content) for content in (original, back))
    assert ("model" in back) == ("model" in original) and before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before)


def test_conversion_of_training_checkpoints(model, tmp_path):
    state = model.transformer.state_dict()
    torch.save(wrap_state(state, "trainer"), tmp_path / "ar-ckpt-last.pth")
    convert_weights.main([str(tmp_path / "ar-ckpt-last.pth"), str(tmp_path / "model.pth")])
    assert torch.load(tmp_path / "model.pth", weights_only=True).keys() == state.keys()


@pytest.mark.parametrize("name, wrapper", [("var_tiny_a", None), ("llamagen_tiny_vq8", "model")])
def test_export_has_published_format(tmp_path, name, wrapper):
    """The bytes of the file do not depend on its name."""
    model = build(name)
    for path in (tmp_path / "out.pt", tmp_path / "again.pt"):
        save_published(model.transformer.state_dict(), path, model.checkpoint_key)
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    content = content[wrapper] if wrapper else content
    assert content.keys() == model.transformer.state_dict().keys()
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "out.pt").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.pt", "out.pt"]


NOT_FINITE = [(dtype, value) for dtype in (torch.float32, torch.float16, torch.bfloat16)
              for value in (float("nan"), float("inf"), -float("inf"))]  # fmt: skip


@pytest.mark.parametrize("dtype, value", [*NOT_FINITE, (torch.float64, 1e300)])
def test_nonfinite_weights_raise(model, tmp_path, dtype, value):
    """Weights are checked in float32, in which 1e300 overflows."""
    state = {k: v.to(dtype, copy=True) for k, v in model.transformer.state_dict().items()}
    state["head.weight"][1, 2] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"w.safetensors: holds weights that are not finite .*: head.weight$"):
        load_weights(build("var_tiny_a").transformer, tmp_path / "w.safetensors", "var-tiny")


PLAIN_CONTENT = [
    np.float64(1.5), np.bool_(True), np.complex64(1j), np.dtype("f4"), collections.Counter("aab"),
]  # fmt: skip
REFUSED_CONTENT = {
    "pathlib.PurePosixPath": pathlib.PurePosixPath("a"),
    "collections.defaultdict": collections.defaultdict(int, a=1),
    "_reconstruct": np.random.RandomState(0).get_state(),
    "numpy.dtypes.VoidDType": np.dtype([("a", "f4")]),
    "datetime.date": datetime.date(2024, 1, 1),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", [None, *REFUSED_CONTENT])
def test_content_besides_tensors(model, tmp_path, name, zipped):
    """Plain values are allowed (no ``name``). The message names any other type, which is refused."""
    other = REFUSED_CONTENT[name] if name else {"best": PLAIN_CONTENT}
    content = {"model": model.transformer.state_dict(), "extra": other}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    if name is None:
        assert read_state_dict(tmp_path / "w.pt").keys() == content["model"].keys()
        return
    with pytest.raises(UserError, match=f"it holds [a-z_.]*{name}.*weights_only=False"):
        read_state_dict(tmp_path / "w.pt")


def test_tensors_may_share_storage(tmp_path):
    number = torch.zeros(1)
    torch.save({"mask": number.expand(512, 512), "again": number}, tmp_path / "w.pt")
    assert read_state_dict(tmp_path / "w.pt")["mask"].shape == (512, 512)


@pytest.mark.parametrize("layout", ["zip", "legacy", "safetensors"])
def test_damaged_files(model, tmp_path, layout):
    """Each damaged file gives a state dict or a UserError, whatever PyTorch or safetensors raise."""
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
        # The structure of the file is described near its start.
        data[random.integers(min(len(data), 3000))] ^= 1 << random.integers(8)
        path.write_bytes(data)
        try:
            read_state_dict(path)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 30 and all(len(m.splitlines()) == 1 and str(path) in m for m in messages)


@pytest.fixture
def shards(model, tmp_path):
    """Write an index and two shards, as the tools of the hub do, and return their folder."""
    state = {k: v.contiguous() for k, v in model.transformer.state_dict().items()}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {key: names[i % 2] for i, key in enumerate(state)}
    for name in names:
        save_file({k: state[k] for k in state if index[k] == name}, tmp_path / name)
    content = {"metadata": {"total_size": 1}, "weight_map": index}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))
    return tmp_path


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "."])
def test_sharded_weights(model, shards, name):
    load_weights(other := build("var_tiny_a").transformer, shards / name, "var-tiny")
    state = model.transformer.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    assert weights_sha256(shards / name) == weights_sha256(shards)
    before = weights_sha256(shards)
    shard = shards / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    assert weights_sha256(shards) != before


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"a": "../model-00001-of-00002.safetensors"}, "index of sharded weights"),
        ({"a": "/etc/passwd"}, "index of sharded weights"),
        ({"a": 3}, "index of sharded weights"),
        ([], "index of sharded weights"),
        ("text", "index of sharded weights"),
        ({"a": "model-00003-of-00003.safetensors"}, "lists model-00003"),
        ({"a": "model-00001-of-00002.safetensors"}, "a is not in model-00001"),
        ({"a": "model.safetensors.index.json"}, "not a weights file"),
    ],
)
def test_broken_index_raises(shards, weight_map, message):
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        read_state_dict(index)
    shutil.copy(index, shards / "other.safetensors.index.json")
    with pytest.raises(UserError, match="holds 2 "):
        read_state_dict(shards)
