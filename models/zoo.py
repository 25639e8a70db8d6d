"""Every published model by name: sizes, weights, recipe, sampling settings, published figures.

This table is the only place for these facts; README's table is tested against it. Sources: the
model zoos of VAR (arXiv 2404.02905), LlamaGen (arXiv 2406.06525) and CCA (arXiv 2410.09347).
"""

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torchvision.models import ResNet50_Weights

from cca.errors import UserError
from models import llamagen, var
from models.autoencoder import LLAMAGEN_KEYS, VAR_KEYS, AutoencoderConfig
from models.base import ARImageModel
from models.checkpoints import file_sha256, load_weights, mismatch
from models.hub import WeightsFile


@dataclass(frozen=True)
class Recipe:
    """Defaults of CCA fine-tuning for one model.

    lr: peak learning rate at a global batch of ``batch_size``; scaled in proportion for VAR.
    warmup: fraction of the run; final_lr: fraction of the peak at the end (1 = constant).
    final_weight_decay: where a cosine takes the weight decay by the end; None keeps it.
    published_accumulation: micro-batches per step in the published run, whose schedule counts
        them; the schedule here then gives the same rates whatever the micro-batch.
    """

    beta: float
    lam: float
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
class Published:
    """Published FID-50k on ImageNet and the sampling settings behind it.

    cca: FID of CCA without guidance; guided: FID of the base at ``cfg_scale`` (notation of
    --cfg-scale); base: FID of the base without guidance, None where it was not published.
    """

    cca: float
    guided: float
    cfg_scale: float
    base: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    class_order: str = "random"
    dtype: str = "bfloat16"
    eval_size: int | None = 256


@dataclass(frozen=True)
class TokenizerEntry:
    backbone: str
    config: var.TokenizerConfig | llamagen.TokenizerConfig
    weights: WeightsFile


@dataclass(frozen=True)
class ZooEntry:
    """One model. ``base`` and ``cca`` map image sizes (pixels) to weights files; None: unpublished."""

    backbone: str
    transformer: var.TransformerConfig | llamagen.TransformerConfig
    tokenizer: str
    base: dict[int, WeightsFile | None]
    recipe: Recipe
    cca: dict[int, WeightsFile] = field(default_factory=dict)
    published: Published | None = None
    default_image_size: int = 256


VAR_256, VAR_512 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
_VAR_AUTOENCODER = AutoencoderConfig(160, (1, 1, 2, 2, 4), 32, VAR_KEYS)


def _vq(multipliers: tuple[int, ...]) -> llamagen.TokenizerConfig:
    return llamagen.TokenizerConfig(AutoencoderConfig(128, multipliers, 256, LLAMAGEN_KEYS))


def _bundled(name: str) -> WeightsFile:
    return WeightsFile(f"{name}.safetensors")


_VAR_REPOSITORY = "FoundationVision/var"
_VAR_VAE = WeightsFile("vae_ch160v4096z32.pth", _VAR_REPOSITORY)
_LLAMAGEN_REPOSITORY = "FoundationVision/LlamaGen"
TOKENIZERS: dict[str, TokenizerEntry] = {
    "vae_ch160v4096z32": TokenizerEntry("var", var.TokenizerConfig(_VAR_AUTOENCODER, VAR_256), _VAR_VAE),
    "vae_ch160v4096z32-512": TokenizerEntry("var", var.TokenizerConfig(_VAR_AUTOENCODER, VAR_512), _VAR_VAE),
    "vq_ds16_c2i": TokenizerEntry(
        "llamagen", _vq((1, 1, 2, 2, 4)), WeightsFile("vq_ds16_c2i.pt", _LLAMAGEN_REPOSITORY)
    ),
    "vq_ds8_c2i": TokenizerEntry(
        "llamagen", _vq((1, 2, 2, 4)), WeightsFile("vq_ds8_c2i.pt", _LLAMAGEN_REPOSITORY)
    ),
    "var-mini-tokenizer": TokenizerEntry(
        "var",
        var.TokenizerConfig(
            AutoencoderConfig(32, (1, 1, 2), 16, VAR_KEYS, blocks=1), (1, 2, 3, 4, 6, 8), vocab_size=512
        ),
        _bundled("var-mini-tokenizer"),
    ),
    "llamagen-mini-tokenizer": TokenizerEntry(
        "llamagen",
        llamagen.TokenizerConfig(
            AutoencoderConfig(32, (1, 1, 2), 32, LLAMAGEN_KEYS, blocks=1), vocab_size=512
        ),
        _bundled("llamagen-mini-tokenizer"),
    ),
}


def _var_figures(cca: float, guided: float, base: float | None = None) -> Published:
    return Published(cca, guided, 2.5, base, 900, 0.96, "balanced", "float16")


def _var(
    depth: int,
    lam: float,
    accumulation: int,
    final_lr: float,
    published: Published | None = None,
    size: int = 256,
    **other,
) -> ZooEntry:
    """VAR of depth d; without ``published`` CCA was not run by its authors. CCA trained d16 without stochastic depth, the others with the pretraining rate."""
    return ZooEntry(
        "var",
        var.TransformerConfig(64 * depth, depth, depth, shared_adaln=size == 512, drop_path_rate=0.0 if depth == 16 else 0.1 * depth / 24),
        "vae_ch160v4096z32" if size == 256 else "vae_ch160v4096z32-512",
        {size: WeightsFile(f"var_d{depth}.pth", _VAR_REPOSITORY)},
        Recipe(
            beta=0.02, lam=lam, lr=2e-5, batch_size=256, grad_clip=2.0, dtype="float16", warmup=0.02, final_lr=final_lr,
            published_accumulation=accumulation, **other,
        ),
        {256: WeightsFile(f"CCA_VAR_Guidance_Free/VAR_d{depth}_CCA.pth", "ChenDRAG/CCA_VAR")} if published else {},
        published,
        size,
    )  # fmt: skip


def _llamagen(
    name: str,
    dim: int,
    layers: int,
    heads: int,
    lam: float,
    published: Published | None = None,
    bases: tuple[int, ...] = (),
    **other,
) -> ZooEntry:
    """LlamaGen; ``bases``: image sizes whose base weights are published. Without ``published`` CCA was not run by its authors."""
    return ZooEntry(
        "llamagen",
        llamagen.TransformerConfig(dim, layers, heads, grid=24),
        "vq_ds16_c2i",
        {
            size: WeightsFile(f"c2i_{name}_{size}.pt", _LLAMAGEN_REPOSITORY) if size in bases else None
            for size in (256, 384, 512)
        },
        Recipe(
            beta=0.02,
            lam=lam,
            lr=1e-5,
            batch_size=256,
            grad_clip=1.0,
            dtype="bfloat16",
            published_accumulation=16,
            **other,
        ),
        {
            384: WeightsFile(
                f"CCA_LlamaGen_Guidance_Free/c2i_{name}_384_CCA_0005000.pt", "ChenDRAG/CCA_LlamaGen"
            )
        }
        if published
        else {},
        published,
        384,
    )


_MINI = dict(lam=3, batch_size=64, dtype="float32", warmup=0.02, final_lr=0.1)
ZOO: dict[str, ZooEntry] = {
    "var-d16": _var(16, 50, 4, 0.1, _var_figures(4.03, 3.55)),
    "var-d20": _var(20, 50, 8, 0.1, _var_figures(3.02, 2.95)),
    "var-d24": _var(24, 100, 8, 0.01, _var_figures(2.63, 2.33, 6.20)),
    "var-d30": _var(30, 1000, 16, 0.01, _var_figures(2.54, 1.97, 5.25), final_weight_decay=0.08),
    "var-d36": _var(36, 1000, 16, 0.01, final_weight_decay=0.08, size=512),
    "llamagen-b": _llamagen("B", 768, 12, 12, 1000, Published(7.04, 6.09, 2.0), (256, 384)),
    "llamagen-l": _llamagen("L", 1024, 24, 16, 300, Published(3.43, 3.07, 2.0, 19.00), (256, 384)),
    "llamagen-xl": _llamagen("XL", 1280, 36, 20, 1000, Published(3.10, 2.62, 1.75), (384,)),
    "llamagen-xxl": _llamagen(
        "XXL", 1536, 48, 24, 1000, Published(3.12, 2.34, 1.75), (384,), parallel="fsdp"
    ),
    "llamagen-3b": _llamagen(
        "3B", 3200, 24, 32, 500, Published(2.69, 2.18, 1.65, 9.38), (384,), parallel="fsdp"
    ),
    "llamagen-xxxl": _llamagen("XXXL", 2560, 48, 40, 1000, parallel="fsdp"),
    "llamagen-1b": _llamagen("1B", 2048, 22, 32, 1000),
    "var-mini": ZooEntry(
        "var",
        var.TransformerConfig(dim=128, depth=3, heads=4, vocab_size=512, num_classes=10),
        "var-mini-tokenizer",
        {32: _bundled("var-mini")},
        Recipe(**_MINI, beta=0.05, lr=1e-3, grad_clip=2.0),
        default_image_size=32,
    ),
    "llamagen-mini": ZooEntry(
        "llamagen",
        llamagen.TransformerConfig(
            dim=128, layers=4, heads=4, grid=8, vocab_size=512, num_classes=10, dropout=0.0
        ),
        "llamagen-mini-tokenizer",
        {32: _bundled("llamagen-mini")},
        Recipe(**_MINI, beta=0.2, lr=1.5e-4, grad_clip=1.0),
        default_image_size=32,
    ),
}


def zoo_entry(name: str, backbone: str | None = None) -> ZooEntry:
    """The zoo's row of that name; raises UserError for another name or another backbone."""
    names = [n for n, entry in ZOO.items() if backbone in (None, entry.backbone)]
    if name not in names:
        raise UserError(f"--model: {name!r} is not one of {', '.join(names)}")
    return ZOO[name]


FASHION_CLASSES = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def class_name(label: int, num_classes: int) -> str:
    """English name of a class: ImageNet-1k's from torchvision, else those of the bundled data."""
    if num_classes == 1000:
        return ResNet50_Weights.DEFAULT.meta["categories"][label]
    return FASHION_CLASSES[label]


@dataclass(frozen=True)
class ModelFiles:
    """What a model is made of: its row, image size, tokenizer and the two weights files, resolved."""

    name: str
    image_size: int
    tokenizer: str
    weights: Path | None
    tokenizer_weights: Path

    def describe(self) -> dict:
        """Provenance for config.json and samples.json."""
        return {
            "model": self.name,
            "image_size": self.image_size,
            "weights_sha256": self.weights and file_sha256(self.weights),
            "tokenizer_sha256": file_sha256(self.tokenizer_weights),
        }


def locate(
    name: str,
    weights: str | None = "base",
    tokenizer_weights: str | None = None,
    image_size: int | None = None,
) -> ModelFiles:
    """Find (downloading what is published and not in the cache) the files of a model.

    Args:
        name: a model of the zoo, such as "var-d16".
        weights: "base", "cca", or a path (.pt, .pth, .safetensors); None: the tokenizer alone is needed.
        tokenizer_weights: a path, or a name of ``TOKENIZERS``; None takes the model's own.
        image_size: pixels; None takes the model's default.

    Raises:
        UserError: an unknown name, size or file, or a published file that cannot be had.
    """
    entry = zoo_entry(name)
    size = image_size or entry.default_image_size
    if size not in entry.base:
        raise UserError(
            f"--image-size: {name} makes images of {', '.join(map(str, entry.base))} pixels, not {size}"
        )
    if weights == "base":
        file = entry.base[size]
    elif weights == "cca":
        file = entry.cca.get(size)
    else:
        file = weights and Path(weights)
    if weights and file is None:
        raise UserError(
            f"--weights: no {weights} weights are published for {name} at {size} pixels; give a path"
        )
    own = tokenizer_weights or entry.tokenizer
    tokenizer = own if own in TOKENIZERS else entry.tokenizer
    if TOKENIZERS[tokenizer].backbone != entry.backbone:
        raise UserError(f"--tokenizer-weights: {tokenizer} is no tokenizer of {name}")
    tokenizer_file = TOKENIZERS[own].weights if own in TOKENIZERS else Path(own)
    tokenizers = [n for n, row in TOKENIZERS.items() if row.backbone == entry.backbone]
    wanted = ((file, "--weights", ("base", "cca")), (tokenizer_file, "--tokenizer-weights", tokenizers))
    for path, option, names in wanted:  # before anything is downloaded
        if isinstance(path, Path) and not path.exists():
            raise UserError(f"{option}: {path}: no such file, nor one of {', '.join(names)}")
    fetched = [f.fetch(option) if isinstance(f, WeightsFile) else f for f, option, _ in wanted]
    return ModelFiles(name, size, tokenizer, *fetched)


def build_model(
    name: str, image_size: int | None = None, tokenizer: str | None = None, device: str = "meta"
) -> ARImageModel:
    """The model without weights: parameters on ``device``, constant buffers on the CPU."""
    entry = zoo_entry(name)
    config = TOKENIZERS[tokenizer or entry.tokenizer].config
    with torch.device(device):
        if entry.backbone == "var":
            return var.VAR(entry.transformer, config)
        grid = (image_size or entry.default_image_size) // config.autoencoder.downsampling
        return llamagen.LlamaGen(replace(entry.transformer, grid=grid), config)


def load_files(files: ModelFiles) -> ARImageModel:
    """Transformer and tokenizer on the CPU, in evaluation mode, memory-mapped where the file allows.

    Raises UserError for a file that is missing, broken or of another model.
    """
    model = build_model(files.name, files.image_size, files.tokenizer)
    if files.weights:
        load_weights(model.transformer, files.weights, files.name, recognise)
    load_weights(model.tokenizer, files.tokenizer_weights, f"the tokenizer of {files.name}", recognise)
    model.tokenizer.requires_grad_(False)
    return model.eval()


def load_model(
    name: str, weights: str = "base", tokenizer_weights: str | None = None, image_size: int | None = None
) -> ARImageModel:
    """Transformer and tokenizer by name; arguments and errors as in ``locate`` and ``load_files``."""
    return load_files(locate(name, weights, tokenizer_weights, image_size))


@functools.cache
def _all_modules() -> dict[str, torch.nn.Module]:
    modules = {name: build_model(name).transformer for name in ZOO}
    for tokenizer, entry in TOKENIZERS.items():
        user = next(name for name, row in ZOO.items() if row.backbone == entry.backbone)
        modules[f"the tokenizer {tokenizer}"] = build_model(user, tokenizer=tokenizer).tokenizer
    return modules


def recognise(state: dict[str, torch.Tensor]) -> str | None:
    """Which model or tokenizer of the zoo a state dict belongs to, by keys and shapes."""
    return next((name for name, module in _all_modules().items() if mismatch(module, state) is None), None)
