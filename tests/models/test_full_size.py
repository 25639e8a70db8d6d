"""Models of published size on the CPU, with weights computed from the names of tensors.

The tests write weights files from the manifests of the published checkpoints, in the published layouts. A
local hub serves them under their published names. The tests take minutes and run only with -m slow.
"""

import argparse
import json

import numpy as np
import pytest
import torch
from commands import run
from golden_models import GOLDEN, named_tensor
from hub_server import hub_variables, serving

from cca.sampling.cuda_graphs import CompiledGenerate
from models import load_model
from models.sampling import SamplingOptions
from models.zoo.checkpoint_formats import is_constant
from models.zoo.loading import build_model


def write_official_file(path, manifest, constants, llamagen):
    """Write a weights file with the keys and shapes of a manifest, and return its path.

    constants: the values of the buffers.
    """
    tensors = json.loads((GOLDEN / "manifests" / f"{manifest}.json").read_text())["state_dict"]
    state = {
        key: constants[key] if is_constant(key) else named_tensor(key, tuple(shape))
        for key, (_, shape) in tensors.items()
    }
    torch.save(
        {"model": state, "args": argparse.Namespace(lr=1e-4), "steps": 300_000} if llamagen else state, path
    )
    return path


MODELS = [
    (
        "var-d16",
        256,
        ("var-d16-256", "var-tokenizer-256"),
        ("FoundationVision/var/var_d16.pth", "FoundationVision/var/vae_ch160v4096z32.pth"),
    ),
    (
        "llamagen-b",
        256,
        ("llamagen-b", "llamagen-vq-16"),
        ("FoundationVision/LlamaGen/c2i_B_256.pt", "FoundationVision/LlamaGen/vq_ds16_c2i.pt"),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, size, manifests, published", MODELS)
def test_sampling_from_published_files(tmp_path, name, size, manifests, published):
    empty = build_model(name, size)
    paths = [
        write_official_file(tmp_path / manifest, manifest, module.state_dict(), name.startswith("llamagen"))
        for module, manifest in zip((empty.transformer, empty.tokenizer), manifests)
    ]
    command = [
        "sample.py",
        "--model",
        name,
        "--image-size",
        size,
        "--num-samples",
        2,
        "--classes",
        "207,360",
        "--top-k",
        1,
    ]
    with serving(dict(zip(published, paths))) as hub:
        run(*command, "--output", tmp_path / "s.npz", **hub_variables(tmp_path / "home", hub.endpoint))
    model = load_model(name, str(paths[0]), str(paths[1]), size)
    labels = torch.tensor([207, 360])
    with torch.inference_mode():
        tokens = model.generate(labels, torch.zeros(2, model.sequence_length), SamplingOptions(top_k=1))
        logits = model.logits(labels, tokens)
        best, chosen = logits.amax(-1), logits.gather(-1, tokens[..., None])[..., 0]
        images = model.to_uint8(model.decode(tokens)).permute(0, 2, 3, 1)
        # This runs the code that --compile traces, with a static cache, but does not compile it.
        compiled = CompiledGenerate(
            model, SamplingOptions(top_k=1), "float32", 2, torch.device("cpu"), "eager"
        )
        assert torch.equal(compiled(labels, torch.zeros(2, model.sequence_length)), tokens)
    assert (best - chosen).max() < 1e-3  # cached decoding agrees with teacher forcing
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_0"].shape == (2, size, size, 3) and file["arr_1"].tolist() == [207, 360]
        difference = np.abs(file["arr_0"].astype(int) - images.numpy())
    assert difference.max() <= 1  # rounding: sample.py pads the batch of two, and this test does not
