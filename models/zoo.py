"""All models by name: sizes, weights, recipe; and how to load one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cca.errors import UserError
from models import llamagen, var
from models.autoencoder import LLAMAGEN_KEYS, VAR_KEYS, AutoencoderConfig
from models.base import ARImageModel
from models.checkpoints import load_weights

ASSETS = Path(__file__).parent.parent / "assets"


@dataclass(frozen=True)
class Recipe:
    """Defaults of CCA fine-tuning for one model.

    lr: peak learning rate at a global batch of ``batch_size``; scaled in proportion for VAR.
    warmup: fraction of the run; final_lr: fraction of the peak at the end (1 = constant).
    published_accumulation: micro-batches per step in the published run, whose schedule counts
        them; the schedule here then gives the same rates whatever the micro-batch.
    """

    beta: float
    lam: float
    lr: float
    batch_size: int
    grad_clip: float
    warmup: float = 0.0
    final_lr: float = 1.0
    weight_decay: float = 0.05
    uncond_ratio: float = 0.1
    epochs: int = 1
    published_accumulation: int = 1


@dataclass(frozen=True)
class ZooEntry:
    backbone: str
    build: Callable[[], ARImageModel]
    weights: Path
    tokenizer_weights: Path
    recipe: Recipe


def _var_mini() -> ARImageModel:
    return var.VAR(
        var.TransformerConfig(dim=128, depth=3, heads=4, vocab_size=512, num_classes=10),
        var.TokenizerConfig(AutoencoderConfig(32, (1, 1, 2), 16, VAR_KEYS, blocks=1), (1, 2, 3, 4, 6, 8), vocab_size=512),
    )


def _llamagen_mini() -> ARImageModel:
    return llamagen.LlamaGen(
        llamagen.TransformerConfig(dim=128, layers=4, heads=4, grid=8, vocab_size=512, num_classes=10, dropout=0.0),
        llamagen.TokenizerConfig(AutoencoderConfig(32, (1, 1, 2), 32, LLAMAGEN_KEYS, blocks=1), vocab_size=512),
    )


def _bundled(name: str, backbone: str, build: Callable[[], ARImageModel], recipe: Recipe) -> ZooEntry:
    return ZooEntry(backbone, build, ASSETS / f"{name}.safetensors", ASSETS / f"{name}-tokenizer.safetensors", recipe)


ZOO: dict[str, ZooEntry] = {
    "var-mini": _bundled(
        "var-mini", "var", _var_mini, Recipe(beta=0.2, lam=10, lr=3e-4, batch_size=64, grad_clip=2.0, warmup=0.02, final_lr=0.1)
    ),
    "llamagen-mini": _bundled("llamagen-mini", "llamagen", _llamagen_mini, Recipe(beta=0.2, lam=10, lr=3e-4, batch_size=64, grad_clip=1.0)),
}


def zoo_entry(name: str, backbone: str | None = None) -> ZooEntry:
    """The zoo's row of that name; raises UserError for another name or another backbone."""
    names = [n for n, entry in ZOO.items() if backbone in (None, entry.backbone)]
    if name not in names:
        raise UserError(f"--model: {name!r} is not one of {', '.join(names)}")
    return ZOO[name]


def transformer_path(name: str, weights: str) -> Path:
    """The file that ``weights`` ("base", "cca" or a path) means for a model."""
    if weights == "base":
        return zoo_entry(name).weights
    if weights == "cca":
        raise UserError(f"--weights: no CCA weights are published for {name}; train them and give the path")
    return Path(weights)


def load_model(name: str, weights: str = "base", tokenizer_weights: str | None = None) -> ARImageModel:
    """Transformer and tokenizer by name, on the CPU, in evaluation mode.

    Args:
        name: a model of the zoo, such as "var-mini".
        weights: "base", "cca", or a path (.pt, .pth, .safetensors).
        tokenizer_weights: a path; None takes the model's own tokenizer.

    Raises:
        UserError: unknown name, or a file that is missing, broken or of another model.
    """
    entry = zoo_entry(name)
    path = transformer_path(name, weights)
    model = entry.build()
    load_weights(model.transformer, path, name)
    load_weights(model.tokenizer, tokenizer_weights or entry.tokenizer_weights, f"the tokenizer of {name}")
    model.tokenizer.requires_grad_(False)
    return model.eval()
