"""Published sizes on the CPU with weights made from tensor names; minutes, so run by hand with -m slow."""

import numpy as np
import pytest
import torch
from commands import run
from golden_models import fill_by_name

from models import load_model
from models.base import SamplingOptions
from models.checkpoints import save_published
from models.zoo import build_model


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("var-d16", 256), ("llamagen-b", 256)])
def test_official_files_sample_greedily(tmp_path, name, size):
    made = build_model(name, size, device="cpu")
    for module, file in ((made.transformer, "weights.pt"), (made.tokenizer, "tokenizer.pt")):
        fill_by_name(module)
        save_published(module.state_dict(), tmp_path / file)
    files = ["--weights", tmp_path / "weights.pt", "--tokenizer-weights", tmp_path / "tokenizer.pt"]
    run("sample.py", "--model", name, "--image-size", size, *files, "--num-samples", 2, "--classes", "207,360", "--top-k", 1, "--output", tmp_path / "s.npz")
    model = load_model(name, str(tmp_path / "weights.pt"), str(tmp_path / "tokenizer.pt"), size)
    labels = torch.tensor([207, 360])
    with torch.inference_mode():
        tokens = model.generate(labels, torch.zeros(2, model.sequence_length), SamplingOptions(top_k=1))
        chosen = model.logits(labels, tokens).gather(-1, tokens[..., None])[..., 0]
        best = model.logits(labels, tokens).amax(-1)
        images = model.to_uint8(model.decode(tokens)).permute(0, 2, 3, 1)
    assert (best - chosen).max() < 1e-3  # the cached decoding agrees with the teacher-forced model
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_0"].shape == (2, size, size, 3) and file["arr_1"].tolist() == [207, 360]
        difference = np.abs(file["arr_0"].astype(int) - images.numpy())
    assert difference.max() <= 1  # one grey level: the batch of two is decoded here without filling up
