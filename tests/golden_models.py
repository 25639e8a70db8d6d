"""The tiny models of the golden files. Their weights are computed from the names of the tensors."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models import llamagen, var
from models.autoencoder import LLAMAGEN_KEYS, VAR_KEYS, AutoencoderConfig
from models.base import ARImageModel
from models.sampling import SamplingOptions
from models.zoo.checkpoint_formats import is_constant

GOLDEN = Path(__file__).parent / "golden"
LLAMAGEN_CASES = ("llamagen_tiny_vq16", "llamagen_tiny_vq8")
VAR_CASES = ("var_tiny_a", "var_tiny_b_shared_adaln")


def golden(name: str) -> dict[str, Tensor]:
    """Return the tensors of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def named_tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of this name, as golden/README.md defines it."""
    z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if z.ndim >= 2:
        z = z / np.sqrt(np.prod(z.shape[1:])).astype(np.float32)
    else:
        z = 1 + 0.1 * z if key.endswith(".weight") else 0.1 * z
    return torch.from_numpy(z.astype(np.float32))


@torch.no_grad()
def fill_by_name(module: nn.Module) -> None:
    """Fill the weights of a module with ``named_tensor``."""
    for key, tensor in module.state_dict().items():
        if not is_constant(key):
            tensor.copy_(named_tensor(key, tuple(tensor.shape)))


def build(name: str) -> ARImageModel:
    """Return the model of a golden file, in evaluation mode."""
    sizes = json.loads((GOLDEN / f"{name}.json").read_text())
    if name.startswith("llamagen"):
        t, k = sizes["transformer"], sizes["tokenizer"]
        model = llamagen.LlamaGen(
            llamagen.TransformerConfig(
                t["dim"],
                t["n_layer"],
                t["n_head"],
                int(t["block_size"] ** 0.5),
                t["vocab_size"],
                t["num_classes"],
                dropout=0.0,
            ),
            llamagen.TokenizerConfig(
                AutoencoderConfig(k["ch"], tuple(k["ch_mult"]), k["z_channels"], LLAMAGEN_KEYS),
                k["vocab_size"],
                k["codebook_dim"],
            ),
        )
    else:
        model = var.VAR(
            var.TransformerConfig(
                sizes["embed_dim"],
                sizes["depth"],
                sizes["num_heads"],
                sizes["vocab_size"],
                sizes["num_classes"],
                sizes["shared_aln"],
            ),
            var.TokenizerConfig(
                AutoencoderConfig(sizes["ch"], (1, 1, 2, 2, 4), sizes["latent_dim"], VAR_KEYS),
                tuple(sizes["patch_nums"]),
                sizes["vocab_size"],
            ),
        )
    fill_by_name(model.transformer)
    fill_by_name(model.tokenizer)
    model.tokenizer.requires_grad_(False)
    return model.eval()


def logits_error(name: str, device: torch.device) -> float:
    """Return the largest error of the logits; assert that tokens and likelihoods match the published code."""
    model, expected = build(name).to(device), golden(name)
    labels, tokens = expected["labels"].to(device), expected["tokens"].to(device)
    with torch.no_grad():
        assert torch.equal(model.encode(expected["image"].to(device)), tokens.long())
        logits, logprob = model.logits(labels, tokens).cpu(), model.sequence_logprob(labels, tokens).cpu()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logprob, expected["sequence_logprob"], rtol=0, atol=1e-3)
    for key in (key for key in expected if key.startswith("greedy_tokens_cfg") and "interval" not in key):
        # In VAR's official code a scale of 0 means no guidance, here 1 does.
        scale = float(key.removeprefix("greedy_tokens_cfg")) + (name in VAR_CASES)
        options = SamplingOptions(scale, model.default_cfg_schedule, top_k=1)
        noise = torch.rand(4, model.sequence_length, device=device)
        tokens = model.generate(torch.arange(4, device=device), noise, options)
        assert torch.equal(tokens.cpu(), expected[key].long())
    return (logits - expected["logits"]).abs().max().item()
