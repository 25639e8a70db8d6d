"""Two tiny models. ``fixtures/specimens`` contains their weights, and images and codes for them."""

from pathlib import Path

import torch

from models import llamagen, var
from models.autoencoder import LLAMAGEN_KEYS, VAR_KEYS, AutoencoderConfig
from models.llamagen import LlamaGen
from models.var import VAR
from models.zoo.registry import TOKENIZERS, ZOO, Recipe, TokenizerEntry, ZooEntry
from scripts import extract_codes

SPECIMENS = Path(__file__).parent / "fixtures" / "specimens"
RECIPE = Recipe(
    beta=0.1, lambda_=10, lr=1e-3, batch_size=8, grad_clip=1.0, dtype="float32", warmup=0.1, final_lr=0.1
)


def register(monkeypatch) -> None:
    """Add the tiny models to the zoo for the duration of a test."""
    rows = {
        VAR: (
            var.TransformerConfig(dim=32, depth=2, heads=2, vocab_size=16, num_classes=4, drop_path_rate=0.1),
            var.TokenizerConfig(
                AutoencoderConfig(32, (1, 1), 4, VAR_KEYS, blocks=1), (1, 2, 4), vocab_size=16
            ),
        ),
        LlamaGen: (
            llamagen.TransformerConfig(dim=32, layers=2, heads=2, grid=4, vocab_size=16, num_classes=4),
            llamagen.TokenizerConfig(
                AutoencoderConfig(32, (1, 1), 32, LLAMAGEN_KEYS, blocks=1), vocab_size=16
            ),
        ),
    }
    for backbone, (transformer, tokenizer) in rows.items():
        name = f"specimen-{backbone.family}"
        monkeypatch.setitem(TOKENIZERS, f"{name}-tokenizer", TokenizerEntry(backbone, tokenizer, None))
        entry = ZooEntry(
            backbone, transformer, f"{name}-tokenizer", {8: None}, {"cca": RECIPE}, default_image_size=8
        )
        monkeypatch.setitem(ZOO, name, entry)


def weights(family: str) -> list[str]:
    """Return the options of a command that select a tiny model and its weights."""
    return [*tokenizer(family), "--weights", f"specimen-{family}.safetensors"]


def tokenizer(family: str) -> list[str]:
    """Return the options of a command that select a tiny model and its tokenizer's weights."""
    name = f"specimen-{family}"
    return ["--model", name, "--tokenizer-weights", f"{name}-tokenizer.safetensors"]


def extract(output, data: str = "images.npz") -> None:
    """Extract the codes of a file of images into the folder ``output``."""
    with torch.no_grad():
        extract_codes.main([*tokenizer("llamagen"), "--data", data, "--output", str(output)])
