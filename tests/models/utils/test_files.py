"""Atomic writes, full disks, damaged arrays, and JSON without NaN."""

import json
import os

import numpy as np
import pytest
import torch
from limits import largest_file

from models.utils.errors import UserError
from models.utils.files import (
    atomic_write,
    finite_or_none,
    parse_json,
    read_array,
    read_json,
    write_json,
)
from models.zoo.checkpoint_formats import save_published, save_safetensors


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "f.json"
    write_json(path, {"a": 1})
    with largest_file(1000), pytest.raises(UserError, match="f.json: cannot be written .File too large"):
        write_json(path, {"a": "x" * 2000})
    with pytest.raises(ZeroDivisionError):  # bugs of our own do not become UserError
        atomic_write(path, lambda temporary: 1 // 0)
    assert read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["f.json"]
    path.write_text('{"a": 1}', encoding="utf-8-sig")  # some editors write a byte-order mark
    assert read_json(path) == parse_json(path.read_bytes()) == {"a": 1}


@pytest.mark.parametrize("save", [save_published, save_safetensors])
def test_weights_on_full_disk(save, tmp_path):
    with largest_file(10_000), pytest.raises(UserError, match="w.pth: cannot be written"):
        save({"a": torch.zeros(100_000)}, tmp_path / "w.pth")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("mmap_mode", [None, "r"])
@pytest.mark.parametrize(
    "damage",
    [(b"(3, 2)", b"((((((")]
    + [
        (b"\x93NUMPY", b"PK\x03\x04MPY"),
        (b"'<i8'", b"'|O8'"),
        (b"(3, 2)", b"(3, 9)"),
        (b"(3, 2), }           ", b"(3, 222222222222), }"),
    ],
    ids=str,
)
def test_damaged_arrays_raise(damage, mmap_mode, tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(6).reshape(3, 2))
    assert read_array(path, mmap_mode).tolist() == [[0, 1], [2, 3], [4, 5]]
    path.write_bytes(path.read_bytes().replace(*damage))
    with pytest.raises(UserError, match=r"a\.npy: is missing or damaged \(."):
        read_array(path, mmap_mode)


NAN, INF = float("nan"), float("inf")


def test_json_never_holds_nan(tmp_path):
    with pytest.raises(UserError, match="r.json: .*metrics.* NaN"):
        write_json(tmp_path / "r.json", {"notes": ["a"], "metrics": {"fid": [1.0, NAN]}})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "r.json", finite_or_none({"loss": NAN, "norms": (1.5, -INF), "n": 3, "x": None}))
    written = json.loads((tmp_path / "r.json").read_text())
    assert written == {"loss": None, "norms": [1.5, None], "n": 3, "x": None}
