"""Reconstruction through a tokenizer: the command, its batches and parts, and GPU memory that runs out."""

import json

import numpy as np
import pytest
import torch
from commands import REFERENCE, run
from made_data import bundled, make_picture

import eval_fid
from models import load_model
from models.base import ARImageModel
from models.utils.errors import UserError, one_line
from models.utils.precision import DECODED_PIXELS, ENCODED_PIXELS
from scripts import reconstruct


def test_reconstruction_and_fid(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images, labels = bundled(50, REFERENCE).values()
    np.savez(tmp_path / "images.npz", arr_0=images, arr_1=labels)
    common = ["--model", "llamagen-mini", "--images", str(tmp_path / "images.npz"), "--batch-size", "16"]
    reconstruct.main([*common, "--output", str(tmp_path / "one.npz")])
    run("-m", "scripts.reconstruct", *common, "--output", tmp_path / "two.npz", processes=2)
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert one["arr_0"].shape == (50, 32, 32, 3) and np.array_equal(one["arr_1"], labels)
        assert np.array_equal(one["arr_0"], two["arr_0"])
        model, pixels = (
            load_model("llamagen-mini"),
            torch.from_numpy(images[:16])[:, None].expand(-1, 3, -1, -1),
        )
        with torch.no_grad():
            decoded = model.to_uint8(model.decode(model.encode(pixels / 127.5 - 1)))
        assert (decoded.permute(0, 2, 3, 1).numpy() != one["arr_0"][:16]).mean() < 0.01
        assert np.abs(one["arr_0"].mean(3) - images).mean() < 25
    options = json.loads((tmp_path / "one.json").read_text())["options"]
    assert len(options["tokenizer_tensors_sha256"]) == len(options["images_sha256"]) == 64
    assert not list(tmp_path.glob(".*"))
    out = tmp_path / "out.json"
    eval_fid.main(
        ["--samples", str(tmp_path / "one.npz"), "--reference", str(tmp_path / "images.npz")]
        + ["--features", "mini", "--output", str(out)]
    )
    assert 0 < json.loads(out.read_text())["metrics"]["fid"] < 5


@pytest.mark.parametrize("name", ["var-mini", "llamagen-mini"])
def test_pixels_do_not_depend_on_batch_size(name, tmp_path, monkeypatch):
    """The encoder gets 5 images at a time and the decoder 3, for every --batch-size."""
    monkeypatch.setitem(ENCODED_PIXELS, "cpu", 5 * 32**2)
    monkeypatch.setitem(DECODED_PIXELS, "cpu", 3 * 32**2)
    batch_sizes = {"encode": set(), "decode": set()}
    for function, original in [(f, getattr(ARImageModel, f)) for f in batch_sizes]:

        def record_size(model, batch, *rest, function=function, original=original):
            batch_sizes[function].add(len(batch))
            return original(model, batch, *rest)

        monkeypatch.setattr(ARImageModel, function, record_size)
    np.savez(tmp_path / "images.npz", arr_0=bundled(23, REFERENCE)["arr_0"])
    for size in ("1", "7", "23"):
        common = ["--model", name, "--images", str(tmp_path / "images.npz"), "--batch-size", size]
        reconstruct.main([*common, "--output", str(tmp_path / f"{size}.npz")])
    assert batch_sizes == {"encode": {5}, "decode": {3}}
    first, *others = [(tmp_path / f"{size}.npz").read_bytes() for size in ("1", "7", "23")]
    assert all(other == first for other in others)


@pytest.mark.parametrize("place", ["encode", "decode"])
def test_oom_is_a_user_error(place, tmp_path, monkeypatch):
    def raise_oom(*_):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(ARImageModel, place, raise_oom)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((9, 32, 32), np.uint8))
    common = ["--model", "var-mini", "--images", str(tmp_path / "a.npz")]
    with pytest.raises(UserError) as caught:
        reconstruct.main([*common, "--output", str(tmp_path / "b.npz")])
    assert one_line(caught.value).startswith(
        "--model: the tokenizer of var-mini does not fit in GPU memory "
        "(CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`); "
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_folder_is_cropped_to_model_resolution(tmp_path):
    for i, size in enumerate([(40, 48), (64, 33), (32, 32)]):
        make_picture(tmp_path / "images" / f"{i}.png", 80 * i, size)
    output = tmp_path / "out.npz"
    common = ["--model", "var-mini", "--images", str(tmp_path / "images"), "--output"]
    reconstruct.main([*common, str(output), "--workers", "1"])
    with np.load(output) as file:
        assert file.files == ["arr_0"] and file["arr_0"].shape == (3, 32, 32, 3)


def test_batches_that_end_inside_a_part(tmp_path, monkeypatch):
    """Each part stores its own images, for every --batch-size."""
    monkeypatch.setattr(reconstruct, "PART_IMAGES", 16)
    np.savez(tmp_path / "images.npz", arr_0=bundled(40, REFERENCE)["arr_0"])
    for size in ("8", "7", "21"):
        common = ["--model", "llamagen-mini", "--images", str(tmp_path / "images.npz")]
        reconstruct.main([*common, "--batch-size", size, "--output", str(tmp_path / f"{size}.npz")])
        with np.load(tmp_path / "8.npz") as whole, np.load(tmp_path / f"{size}.npz") as other:
            assert len(other["arr_0"]) == 40 and np.array_equal(whole["arr_0"], other["arr_0"])
