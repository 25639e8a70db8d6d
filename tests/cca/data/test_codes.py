"""Codes as the trainer reads them: two folders of crops, damaged files, fingerprints, tokenizers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_data import make_codes

import train_llamagen_cca
from cca.data.codes import Codes
from models import load_model
from models.utils.errors import UserError
from models.zoo.checkpoint_formats import save_published, tensors_sha256


@pytest.fixture(scope="module")
def model():
    return load_model("llamagen-mini")


def test_mismatched_second_folder_is_refused(tmp_path, model):
    path = make_codes(tmp_path)
    shutil.copytree(path, second := tmp_path / "codes_105")
    np.save(second / "labels.npy", (np.arange(40) + 1) % 10)
    with pytest.raises(UserError, match="--codes: .*codes and .*codes_105 have different labels"):
        Codes(path, model)
    published = make_codes(tmp_path / "published", published=True)
    shutil.copytree(path, f"{published}_105")
    with pytest.raises(UserError, match="--codes: .*codes_105/imagenet32_codes: cannot be listed"):
        Codes(published, model)


def test_broken_link_in_published_codes(tmp_path, model):
    path = make_codes(tmp_path, published=True)
    (path / "imagenet32_codes/3.npy").unlink()
    (path / "imagenet32_codes/3.npy").symlink_to("gone.npy")
    with pytest.raises(UserError, match="--codes: .*imagenet32_codes: cannot be read"):
        Codes(path, model).fingerprint()


def test_second_folder_gives_half_of_the_crops(tmp_path, model, monkeypatch):
    path = make_codes(tmp_path)
    shifted = np.load(path / "codes.npy") % 256
    np.save(path / "codes.npy", shifted)
    monkeypatch.chdir(path)
    shutil.copytree(path, tmp_path / "codes_105")
    np.save(tmp_path / "codes_105" / "codes.npy", shifted + 256)
    for name in (path, Path(), Path("../codes")):  # a relative path has a second folder, too
        data = Codes(name, model)
        is_second = [bool(data.item(epoch, index)[0] >= 256) for epoch in range(10) for index in range(40)]
        assert 160 < sum(is_second) < 240


NO_ARRAY = b"\x93NUMPY\x01\x00v\x00{(((((("
BEYOND = np.zeros((40, 10, 64), np.uint16)
BEYOND[39, 9, 63] = 512
BROKEN = [
    ({"labels": np.arange(80) % 10}, "codes of 40 images but 80 labels"),
    ({"labels": np.eye(10, dtype=np.int64)[np.arange(40) % 10]}, r"shape \[40, 10\]; .* argmax"),
    ({"labels": np.zeros((40, 1), np.int64)}, r"shape \[40, 1\]"),
    ({"labels": np.full(40, 0.5)}, "labels are float64"),
    ({"codes": BEYOND}, "codes from 0 to 512; expected 0 … 511"),
    ({"codes": np.full((40, 10, 64), -1)}, "codes from -1"),
    ({"codes": np.zeros((40, 10, 64), np.float32)}, "holds float32 codes"),
    ({"codes": np.zeros((40, 64), np.int64)}, r"shape \[40, 64\]"),
    ({"codes": np.zeros((40, 10, 63), np.int64)}, r"expected \[images, crops, 64\]|64 per image"),
]


@pytest.mark.parametrize("arrays, message", BROKEN, ids=lambda value: None)
def test_invalid_codes_are_refused(tmp_path, model, arrays, message):
    path = make_codes(tmp_path)
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    with pytest.raises(UserError, match=message):
        Codes(path, model)


HEADERS = [("header.json", text) for text in (b"[]", b"{", b'"x"', b"[" * 50_000, b'{"vocab_size": 16}')]


@pytest.mark.parametrize("name, content", [("codes.npy", NO_ARRAY), ("labels.npy", NO_ARRAY), *HEADERS])
def test_damaged_file_is_refused(tmp_path, model, name, content):
    path = make_codes(tmp_path)
    (path / name).write_bytes(content)
    why = rf"{name}: is missing or damaged" if content == NO_ARRAY else ""
    with pytest.raises(UserError, match=f"--codes: .*{why}"):
        Codes(path, model)


def test_codes_of_another_tokenizer_are_refused(tmp_path, model):
    path = make_codes(tmp_path)
    assert any("not checked" in note for note in Codes(path, model).notes())
    header = {"format": 1, "vocab_size": 512, "tokenizer_tensors_sha256": tensors_sha256(model.tokenizer)}
    (path / "header.json").write_text(json.dumps(header))
    data = Codes(path, model)
    assert data.notes() == []
    state = {key: value.clone() for key, value in model.tokenizer.state_dict().items()}
    save_published(state, tmp_path / "same.pt", "model")
    data.check_tokenizer(load_model("llamagen-mini", tokenizer_weights=str(tmp_path / "same.pt")))
    next(iter(state.values())).view(-1)[0] += 1
    save_published(state, tmp_path / "other.pt", "model")
    other = ["--tokenizer-weights", str(tmp_path / "other.pt"), "--output", str(tmp_path / "run")]
    with pytest.raises(UserError, match="other tokenizer weights"):
        train_llamagen_cca.main(
            ["--model", "llamagen-mini", "--codes", str(path), "--batch-size", "8", *other]
        )
    assert not (tmp_path / "run").exists()


def test_fingerprint_changes_with_codes_and_labels(tmp_path, model):
    path = make_codes(tmp_path)
    prints = [Codes(path, model).fingerprint()]
    for name in ("codes", "labels"):
        np.save(path / f"{name}.npy", np.load(path / f"{name}.npy")[::-1])
        prints.append(Codes(path, model).fingerprint())
    shutil.copytree(path, tmp_path / "codes_105")
    prints.append(Codes(path, model).fingerprint())
    assert len(set(prints)) == 4


@pytest.mark.parametrize("name", ["imagenet32_codes/0", "imagenet32_codes/3", "imagenet32_labels/3"])
@pytest.mark.parametrize("damage", ["cut", "missing", "broken header"])
def test_damaged_published_files_are_refused(tmp_path, model, name, damage):
    path = make_codes(tmp_path, published=True)
    file = path / f"{name}.npy"
    if damage == "missing":
        file.rename(file.with_name("40.npy"))
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "cut" else NO_ARRAY)
    with pytest.raises(UserError, match=rf"--codes: .*{name}\.npy: is missing or damaged"):
        Codes(path, model).fingerprint()


@pytest.mark.parametrize(
    "file, array, message",
    [
        ("imagenet32_labels/3.npy", np.eye(10), "holds 100 labels; expected one"),
        ("imagenet32_codes/3.npy", np.zeros((1, 10, 64)), "holds float64"),
        ("imagenet32_codes/3.npy", np.array(3), "expected integers"),
    ],
)
def test_published_codes_and_labels_are_checked(tmp_path, model, file, array, message):
    data = Codes(make_codes(tmp_path, published=True), model)
    np.save(tmp_path / "codes" / file, array)
    with pytest.raises(UserError, match=message):
        data.item(0, 3), data.labels(np.array([3]))
    (tmp_path / "codes" / "imagenet32_labels" / "39.npy").unlink()
    with pytest.raises(UserError, match="a label for each of the 40 codes"):
        Codes(tmp_path / "codes", model)
