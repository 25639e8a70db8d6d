"""Weights that are written as published, and numbers that are none."""

import pytest
import torch
from golden_models import build
from safetensors.torch import save_file

from models.errors import UserError
from models.weights import load_weights, save_published


@pytest.mark.parametrize("name, wrapper", [("var_tiny_a", None), ("llamagen_tiny_vq8", "model")])
def test_export_is_in_the_published_format(tmp_path, name, wrapper):
    model = build(name)
    save_published(model.transformer.state_dict(), tmp_path / "out.pt", model.checkpoint_key)
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    content = content[wrapper] if wrapper else content
    assert content.keys() == model.transformer.state_dict().keys()
    assert [p.name for p in tmp_path.iterdir()] == ["out.pt"]
    save_published(model.transformer.state_dict(), tmp_path / "again.pt", model.checkpoint_key)
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "out.pt").read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite(tmp_path, value, dtype):
    state = {k: v.to(dtype, copy=True) for k, v in build("var_tiny_a").transformer.state_dict().items()}
    state["head.weight"][1, 2] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"w.safetensors: holds weights that are not finite .*: head.weight$"):
        load_weights(build("var_tiny_a").transformer, tmp_path / "w.safetensors", "var-tiny")


def test_too_large_for_float32(tmp_path):
    state = {k: v.double() for k, v in build("var_tiny_a").transformer.state_dict().items()}
    state["head.bias"][0] = 1e300
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match="not finite .*head.bias"):
        load_weights(build("var_tiny_a").transformer, tmp_path / "w.pt", "var-tiny")
