"""The tables of models and tokenizers: sizes, weights, recipes and published figures.

These facts stand nowhere else. Figures with guidance are from the model zoos of VAR (arXiv 2404.02905)
and LlamaGen (arXiv 2406.06525). The others are from CCA's model zoo and the tables of its paper (arXiv
2410.09347).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from models import llamagen, var
from models.autoencoder import LLAMAGEN_KEYS, VAR_KEYS, AutoencoderConfig
from models.base import ARImageModel
from models.llamagen import LlamaGen
from models.var import VAR
from models.zoo.hub import WeightsFile

Figures = Mapping[str, float]  # value of each metric, with the names of eval_fid.py


@dataclass(frozen=True)
class Published:
    """Published figures of 50,000 samples on ImageNet 256, with their sampling settings.

    figures: for each sampled model "base", "guided" (the base at ``cfg_scale``), "cca", and the paper's
        baselines "dpo" and "unlearning". All except "guided" are without guidance. Figures that were not
        published are missing.
    cfg_scale: guidance scale, in the notation of --cfg-scale.
    notes: figures that differ between sources, and settings that no source states.
    with_guidance: address of a folder with the weights of CCA trained for sampling with guidance.
    """

    figures: Mapping[str, Figures]
    cfg_scale: float
    notes: tuple[str, ...] = ()
    with_guidance: str | None = None
    top_k: int = 0
    top_p: float = 1.0
    class_order: str = "random"
    dtype: str = "bfloat16"
    eval_size: int | None = 256

    @property
    def has_filters(self) -> bool:
        return self.top_k > 0 or self.top_p < 1

    def fid(self, sampled: str) -> float | None:
        return self.figures.get(sampled, {}).get("fid")


def _figures(
    fid: float,
    inception: float | None = None,
    sfid: float | None = None,
    precision: float | None = None,
    recall: float | None = None,
) -> Figures:
    figures = {"fid": fid, "sfid": sfid, "is": inception, "precision": precision, "recall": recall}
    return {name: value for name, value in figures.items() if value is not None}


def _var_figures(*notes: str, **figures: Figures) -> Published:
    filters_note = ("no source states the filters for the base without guidance",)
    return Published(
        figures,
        2.5,
        (*notes, *(filters_note if "base" in figures else ())),
        top_k=900,
        top_p=0.96,
        class_order="balanced",
        dtype="float16",
    )


def _llamagen_figures(cfg_scale: float, *notes: str, **figures: Figures) -> Published:
    folder = "https://huggingface.co/ChenDRAG/CCA_LlamaGen/tree/main/CCA_LlamaGen_w_CFG"
    return Published(figures, cfg_scale, notes, folder)


PUBLISHED: dict[str, Published] = {
    "var-d16": _var_figures(guided=_figures(3.55), cca=_figures(4.03)),
    "var-d20": _var_figures(guided=_figures(2.95), cca=_figures(3.02)),
    "var-d24": _var_figures(
        base=_figures(6.20, 154.3, 8.50, 0.74, 0.62),
        guided=_figures(2.33),
        cca=_figures(2.63, 298.8, 7.63, 0.84, 0.55),
        dpo=_figures(7.53, 232.6, 19.10, 0.85, 0.34),
        unlearning=_figures(5.55, 165.9, 8.41, 0.75, 0.61),
    ),
    "var-d30": _var_figures(
        "CCA's paper reports FID 1.92 and IS 323.1 for the base with guidance",
        base=_figures(5.25, 175.6, None, 0.75, 0.62),
        guided=_figures(1.97),
        cca=_figures(2.54, 264.2, None, 0.83, 0.56),
    ),
    "llamagen-b": _llamagen_figures(2.0, guided=_figures(6.09), cca=_figures(7.04)),
    "llamagen-l": _llamagen_figures(
        2.0,
        "the abstract page of CCA's paper reports FID 19.07 and IS 64.3 for the base, FID 3.41 for CCA",
        base=_figures(19.00, 64.7, 8.78, 0.61, 0.67),
        guided=_figures(3.07),
        cca=_figures(3.43, 288.2, 7.44, 0.81, 0.52),
        dpo=_figures(61.69, 30.8, 44.98, 0.36, 0.40),
        unlearning=_figures(12.22, 111.6, 7.99, 0.66, 0.64),
    ),
    "llamagen-xl": _llamagen_figures(1.75, guided=_figures(2.62), cca=_figures(3.10)),
    "llamagen-xxl": _llamagen_figures(1.75, guided=_figures(2.34), cca=_figures(3.12)),
    "llamagen-3b": _llamagen_figures(
        1.65,
        base=_figures(9.38, 112.9, None, 0.69, 0.67),
        guided=_figures(2.18, 263.3),
        cca=_figures(2.69, 276.8, None, 0.80, 0.59),
    ),
}


@dataclass(frozen=True)
class Recipe:
    """Defaults of fine-tuning one model with one loss.

    lr: peak learning rate at a global batch of ``batch_size``; for VAR it is proportional to the batch size.
    grad_clip: largest norm of the gradient of the global batch's mean loss.
    warmup: fraction of the run.
    final_lr: learning rate at the end, as a fraction of the peak (1 = constant).
    final_weight_decay: weight decay at the end of a cosine schedule; None keeps it constant.
    published_accumulation: micro-batches per step in the published run, whose schedule counts micro-batches.
        With it, the schedule here has the published rates at any micro-batch size.
    """

    beta: float
    lambda_: float
    lr: float
    batch_size: int
    grad_clip: float
    dtype: str
    warmup: float = 0.0
    final_lr: float = 1.0
    weight_decay: float = 0.05
    final_weight_decay: float | None = None
    uncond_ratio: float = 0.1
    epochs: int = 1
    published_accumulation: int = 1
    parallel: str = "ddp"


@dataclass(frozen=True)
class TokenizerEntry:
    """One tokenizer: the backbone that uses it, its configuration, and its weights (None: no weights)."""

    backbone: type[ARImageModel]
    config: Any
    weights: WeightsFile | None


@dataclass(frozen=True)
class ZooEntry:
    """One model. ``backbone.build`` builds it from ``transformer`` and the config of ``tokenizer``.

    base, cca: weights files by image size (pixels); None: not published.
    recipes: defaults of training by loss. "with-guidance" is CCA for sampling with guidance. Losses without
        published values are missing.
    """

    backbone: type[ARImageModel]
    transformer: Any
    tokenizer: str
    base: Mapping[int, WeightsFile | None]
    recipes: Mapping[str, Recipe]
    cca: Mapping[int, WeightsFile] = field(default_factory=dict)
    published: Published | None = None
    default_image_size: int = 256

    @property
    def is_bundled(self) -> bool:
        """Whether the weights of the base ship with the project."""
        base = self.base[self.default_image_size]
        return base is not None and base.repository is None


VAR_256, VAR_512 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
_VAR_AUTOENCODER = AutoencoderConfig(160, (1, 1, 2, 2, 4), 32, VAR_KEYS)


def _vq(multipliers: tuple[int, ...]) -> llamagen.TokenizerConfig:
    return llamagen.TokenizerConfig(AutoencoderConfig(128, multipliers, 256, LLAMAGEN_KEYS))


_VAR_REPOSITORY = "FoundationVision/var"
_VAR_VAE = WeightsFile("vae_ch160v4096z32.pth", _VAR_REPOSITORY)
_LLAMAGEN_REPOSITORY = "FoundationVision/LlamaGen"
TOKENIZERS: dict[str, TokenizerEntry] = {
    "vae_ch160v4096z32": TokenizerEntry(VAR, var.TokenizerConfig(_VAR_AUTOENCODER, VAR_256), _VAR_VAE),
    "vae_ch160v4096z32-512": TokenizerEntry(VAR, var.TokenizerConfig(_VAR_AUTOENCODER, VAR_512), _VAR_VAE),
    "vq_ds16_c2i": TokenizerEntry(
        LlamaGen, _vq((1, 1, 2, 2, 4)), WeightsFile("vq_ds16_c2i.pt", _LLAMAGEN_REPOSITORY)
    ),
    "vq_ds8_c2i": TokenizerEntry(
        LlamaGen, _vq((1, 2, 2, 4)), WeightsFile("vq_ds8_c2i.pt", _LLAMAGEN_REPOSITORY)
    ),
    "var-mini-tokenizer": TokenizerEntry(
        VAR,
        var.TokenizerConfig(
            AutoencoderConfig(32, (1, 1, 2), 16, VAR_KEYS, blocks=1), (1, 2, 3, 4, 6, 8), vocab_size=512
        ),
        WeightsFile("var-mini-tokenizer.safetensors"),
    ),
    "llamagen-mini-tokenizer": TokenizerEntry(
        LlamaGen,
        llamagen.TokenizerConfig(
            AutoencoderConfig(32, (1, 1, 2), 32, LLAMAGEN_KEYS, blocks=1), vocab_size=512
        ),
        WeightsFile("llamagen-mini-tokenizer.safetensors"),
    ),
}


def _var(
    depth: int,
    lambda_: float,
    accumulation: int,
    final_lr: float,
    size: int = 256,
    **other,
) -> ZooEntry:
    """Return VAR of depth d. The authors of CCA did not run models without published figures.

    They trained d16 without stochastic depth, and the others with the rate of pretraining.
    """
    recipe = Recipe(
        beta=0.02, lambda_=lambda_, lr=2e-5, batch_size=256, grad_clip=2.0, dtype="float16", warmup=0.02,
        final_lr=final_lr, published_accumulation=accumulation, **other,
    )  # fmt: skip
    published = PUBLISHED.get(f"var-d{depth}")
    drop_path = 0.0 if depth == 16 else 0.1 * depth / 24
    return ZooEntry(
        VAR,
        var.TransformerConfig(64 * depth, depth, depth, shared_adaln=size == 512, drop_path_rate=drop_path),
        "vae_ch160v4096z32" if size == 256 else "vae_ch160v4096z32-512",
        {size: WeightsFile(f"var_d{depth}.pth", _VAR_REPOSITORY)},
        {"cca": recipe, "sft": recipe},
        {256: WeightsFile(f"CCA_VAR_Guidance_Free/VAR_d{depth}_CCA.pth", "ChenDRAG/CCA_VAR")}
        if published
        else {},
        published,
        size,
    )


def _llamagen(
    name: str,
    dim: int,
    layers: int,
    heads: int,
    lambda_: float,
    bases: tuple[int, ...] = (),
    **other,
) -> ZooEntry:
    """Return a LlamaGen model; ``bases`` are the image sizes whose base weights are published.

    The authors of CCA did not run models without published figures.
    """
    published = PUBLISHED.get(f"llamagen-{name.lower()}")
    cca = WeightsFile(f"CCA_LlamaGen_Guidance_Free/c2i_{name}_384_CCA_0005000.pt", "ChenDRAG/CCA_LlamaGen")
    # The published trainers clip the sum of the gradients of 16 micro-batches at 1. Here the mean is clipped.
    recipe = Recipe(
        beta=0.02, lambda_=lambda_, lr=1e-5, batch_size=256, grad_clip=1 / 16, dtype="bfloat16",
        published_accumulation=16, **other,
    )  # fmt: skip
    # From the section of the paper that combines CCA and guidance.
    guided = replace(recipe, lambda_=1, beta=0.02 if name == "L" else 0.1)
    return ZooEntry(
        LlamaGen,
        llamagen.TransformerConfig(dim, layers, heads, grid=24),
        "vq_ds16_c2i",
        {
            size: WeightsFile(f"c2i_{name}_{size}.pt", _LLAMAGEN_REPOSITORY) if size in bases else None
            for size in (256, 384, 512)
        },
        {"cca": recipe, "sft": recipe, "with-guidance": guided},
        {384: cca} if published else {},
        published,
        384,
    )


def _mini(beta: float, lambda_: float, lr: float, batch_size: int, grad_clip: float) -> Recipe:
    """Return a recipe of a bundled model.

    The values were chosen by comparison (results/mini-notes.md). The control (sft) has the values of CCA.
    """
    return Recipe(
        beta, lambda_, lr, batch_size, grad_clip, dtype="float32", warmup=0.02, final_lr=0.1, epochs=2
    )  # fmt: skip


ZOO: dict[str, ZooEntry] = {
    "var-d16": _var(16, 50, 4, 0.1),
    "var-d20": _var(20, 50, 8, 0.1),
    "var-d24": _var(24, 100, 8, 0.01),
    "var-d30": _var(30, 1000, 16, 0.01, final_weight_decay=0.08),
    "var-d36": _var(36, 1000, 16, 0.01, final_weight_decay=0.08, size=512),
    "llamagen-b": _llamagen("B", 768, 12, 12, 1000, (256, 384)),
    "llamagen-l": _llamagen("L", 1024, 24, 16, 300, (256, 384)),
    "llamagen-xl": _llamagen("XL", 1280, 36, 20, 1000, (384,)),
    "llamagen-xxl": _llamagen("XXL", 1536, 48, 24, 1000, (384,), parallel="fsdp"),
    "llamagen-3b": _llamagen("3B", 3200, 24, 32, 500, (384,), parallel="fsdp"),
    "llamagen-xxxl": _llamagen("XXXL", 2560, 48, 40, 1000, parallel="fsdp"),
    "llamagen-1b": _llamagen("1B", 2048, 22, 32, 1000),
    "var-mini": ZooEntry(
        VAR,
        var.TransformerConfig(dim=64, depth=2, heads=4, vocab_size=512, num_classes=10),
        "var-mini-tokenizer",
        {32: WeightsFile("var-mini.safetensors")},
        {
            "cca": _mini(0.05, 10, 1e-3, 64, 2.0),
            "sft": _mini(0.05, 10, 1e-3, 64, 2.0),
            "with-guidance": _mini(0.1, 1, 1e-3, 64, 2.0),
            "dpo": _mini(0.2, 1, 1e-4, 64, 2.0),
            "unlearning": _mini(1, 0.3, 3e-5, 64, 2.0),
        },
        {32: WeightsFile("var-mini-cca.safetensors")},
        default_image_size=32,
    ),
    "llamagen-mini": ZooEntry(
        LlamaGen,
        llamagen.TransformerConfig(
            dim=64, layers=2, heads=4, grid=8, vocab_size=512, num_classes=10, dropout=0.0
        ),
        "llamagen-mini-tokenizer",
        {32: WeightsFile("llamagen-mini.safetensors")},
        {
            "cca": _mini(0.2, 10, 5e-4, 128, 1.0),
            "sft": _mini(0.2, 10, 5e-4, 128, 1.0),
            "with-guidance": _mini(0.1, 1, 5e-4, 128, 1.0),
            "dpo": _mini(0.2, 1, 1e-4, 128, 1.0),
            "unlearning": _mini(1, 0.3, 3e-5, 128, 1.0),
        },
        {32: WeightsFile("llamagen-mini-cca.safetensors")},
        default_image_size=32,
    ),
}

FASHION_CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def class_name(label: int, num_classes: int) -> str:
    """Return the English name of a class of ImageNet-1k (from torchvision) or of the bundled data.

    Classes of other data have their number as their name.
    """
    if num_classes == 1000:
        from torchvision.models import ResNet50_Weights  # this import is slow

        return ResNet50_Weights.DEFAULT.meta["categories"][label]
    return FASHION_CLASSES[label] if num_classes == len(FASHION_CLASSES) else str(label)
