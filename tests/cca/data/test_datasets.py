"""Encoding of images to tokens in parts, and images in an .npz."""

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
def test_encoding_in_parts_gives_the_same_tokens(name, pixels, monkeypatch):
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
    # Training uses these tokens: the backward pass would refuse inference tensors.
    model.sequence_logprob(torch.zeros(12, dtype=torch.int64), tokens).sum().backward()


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_of_an_npz(tmp_path, save, colour):
    """Uncompressed images are memory-mapped, compressed ones are read; the items are the same."""
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
def test_damaged_npz_is_refused(tmp_path, save):
    """The checksum of a mapped array is checked by ``fingerprint``, that of a compressed one on reading."""
    save(tmp_path / "a.npz", **bundled(200))
    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(damaged)
    with pytest.raises(UserError, match="a.npz: arr_0 is (cut off or damaged|not readable)"):
        ImageArray(tmp_path / "a.npz", load_model("var-mini")).fingerprint()
