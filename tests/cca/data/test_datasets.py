"""Pixels become tokens in parts, whatever the batch; an .npz is mapped into memory, or read once."""

import numpy as np
import pytest
import torch
from commands import TRAIN
from made_data import bundled

from cca.data.datasets import ImageArray
from cca.training.encoding import to_model_input, to_tokens
from models import load_model
from models.utils.errors import UserError
from models.utils.precision import ENCODED_PIXELS


@pytest.mark.parametrize("name", ["var-mini", "llamagen-mini"])
@pytest.mark.parametrize("pixels", [1, 5 * 32 * 32, 2**18])
def test_encoding_in_parts_makes_the_same_tokens(name, pixels, monkeypatch):
    model = load_model(name)
    data, sizes, encode = ImageArray(TRAIN, model), [], model.encode
    batch = torch.stack([data.item(0, index) for index in range(12)])
    with torch.no_grad():
        expected = encode(to_model_input(batch))
    monkeypatch.setattr(model, "encode", lambda images: (sizes.append(len(images)), encode(images))[1])
    monkeypatch.setitem(ENCODED_PIXELS, "cpu", pixels)
    tokens = to_tokens(model, batch, torch.device("cpu"))
    assert torch.equal(tokens, expected)
    assert sizes == {1: [1] * 12, 5 * 32 * 32: [5, 5, 2], 2**18: [12]}[pixels]
    # Training takes them as they are: a layer's inputs are kept for its gradient.
    model.sequence_logprob(torch.zeros(12, dtype=torch.int64), tokens).sum().backward()


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_of_an_npz(tmp_path, save, colour):
    """Mapped into memory where they are stored uncompressed; the same items either way."""
    content = bundled(30)
    if colour:
        content["arr_0"] = np.stack([content["arr_0"], 255 - content["arr_0"], content["arr_0"] // 2], -1)
    save(tmp_path / "a.npz", **content)
    data = ImageArray(tmp_path / "a.npz", load_model("var-mini"))
    assert isinstance(data.images, np.memmap) is (save is np.savez)
    for index, image in enumerate(content["arr_0"]):
        expected = image.transpose(2, 0, 1) if colour else np.broadcast_to(image, (3, 32, 32))
        item = data.item(0, index)
        assert item.dtype == torch.uint8 and np.array_equal(item.numpy(), expected)
    assert data.fingerprint()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_is_found_before_training(tmp_path, save):
    """By its checksum: what is mapped when the fingerprint is taken, what is read when it is read."""
    save(tmp_path / "a.npz", **bundled(200))
    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(damaged)
    with pytest.raises(UserError, match="a.npz: arr_0 is (cut off or damaged|not readable)"):
        ImageArray(tmp_path / "a.npz", load_model("var-mini")).fingerprint()
