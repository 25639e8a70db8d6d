"""Finding and loading models of the zoo: by name, from the hub, from files."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.base import ARImageModel
from models.checkpoints import weights_sha256
from models.errors import UserError
from models.hub import WeightsFile
from models.weights import approximate_size, load_weights, mismatch
from models.zoo import TOKENIZERS, ZOO, ZooEntry


def model_names(backbone: type[ARImageModel] | None = None) -> list[str]:
    """The zoo's models, of one backbone or all."""
    return [name for name, entry in ZOO.items() if backbone in (None, entry.backbone)]


def zoo_entry(name: str, backbone: type[ARImageModel] | None = None) -> ZooEntry:
    """The zoo's row of that name; raises UserError for another name or another backbone."""
    names = model_names(backbone)
    if name not in names:
        raise UserError(f"--model: {name!r} is not one of {', '.join(names)}")
    return ZOO[name]


@dataclass(frozen=True)
class ModelFiles:
    """What a model is made of: its row, image size, tokenizer and the two weights files, resolved."""

    name: str
    image_size: int
    tokenizer: str
    weights: Path | None
    tokenizer_weights: Path | None

    def describe(self) -> dict:
        """Provenance for config.json and samples.json."""
        return {
            "model": self.name,
            "image_size": self.image_size,
            "weights_sha256": self.weights and weights_sha256(self.weights),
            "tokenizer_sha256": self.tokenizer_weights and weights_sha256(self.tokenizer_weights),
        }


@dataclass(frozen=True)
class ModelSources:
    """What a model is to be made of, before anything is downloaded: as ``ModelFiles``, but unresolved."""

    name: str
    image_size: int
    tokenizer: str
    weights: WeightsFile | Path | None
    tokenizer_weights: WeightsFile | Path | None

    def fetch(self) -> ModelFiles:
        """The files, downloaded if need be; raises UserError where one cannot be had."""
        weights, tokenizer_weights = (
            file.fetch(option) if isinstance(file, WeightsFile) else file
            for file, option in ((self.weights, "--weights"), (self.tokenizer_weights, "--tokenizer-weights"))
        )
        return ModelFiles(self.name, self.image_size, self.tokenizer, weights, tokenizer_weights)

    def downloads(self) -> list[tuple[WeightsFile, int]]:
        """What ``fetch`` would download: files that are not on this machine, and about how many bytes."""
        model = build_model(self.name, self.image_size, self.tokenizer)
        both = ((self.weights, model.transformer), (self.tokenizer_weights, model.tokenizer))
        return [
            (file, approximate_size(module))
            for file, module in both
            if isinstance(file, WeightsFile) and not file.cached()
        ]


def find_sources(
    name: str,
    weights: str | None = "base",
    tokenizer_weights: str | None = None,
    image_size: int | None = None,
) -> ModelSources:
    """What ``locate`` would load, without a download; arguments and errors as there."""
    entry = zoo_entry(name)
    size = image_size or entry.default_image_size
    if size not in entry.base:
        raise UserError(
            f"--image-size: {name} makes images of {', '.join(map(str, entry.base))} pixels, not {size}"
        )
    file: WeightsFile | Path | None
    if weights == "base":
        file = entry.base[size]
    elif weights == "cca":
        file = entry.cca.get(size)
    else:
        file = Path(weights) if weights else None
    if weights and file is None:
        raise UserError(
            f"--weights: no {weights} weights are published for {name} at {size} pixels; give a path"
        )
    own = tokenizer_weights or entry.tokenizer
    tokenizer = own if own in TOKENIZERS else entry.tokenizer
    if TOKENIZERS[tokenizer].backbone is not entry.backbone:
        raise UserError(f"--tokenizer-weights: {tokenizer} is no tokenizer of {name}")
    tokenizer_file = TOKENIZERS[own].weights if own in TOKENIZERS else Path(own)
    tokenizers = [n for n, row in TOKENIZERS.items() if row.backbone is entry.backbone]
    wanted = ((file, "--weights", ("base", "cca")), (tokenizer_file, "--tokenizer-weights", tokenizers))
    for path, option, names in wanted:  # before anything is downloaded
        if isinstance(path, Path) and not path.exists():
            raise UserError(f"{option}: {path}: no such file, nor one of {', '.join(names)}")
    return ModelSources(name, size, tokenizer, file, tokenizer_file)


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
    return find_sources(name, weights, tokenizer_weights, image_size).fetch()


def build_model(
    name: str, image_size: int | None = None, tokenizer: str | None = None, device: str = "meta"
) -> ARImageModel:
    """The model without weights: parameters on ``device``, constant buffers on the CPU."""
    entry = zoo_entry(name)
    config = TOKENIZERS[tokenizer or entry.tokenizer].config
    with torch.device(device):
        return entry.backbone.build(entry.transformer, config, image_size or entry.default_image_size)


def load_files(files: ModelFiles) -> ARImageModel:
    """Transformer and tokenizer on the CPU, in evaluation mode, memory-mapped where the file allows.

    Raises UserError for a file that is missing, broken or of another model.
    """
    model = build_model(files.name, files.image_size, files.tokenizer)
    if files.weights:
        load_weights(model.transformer, files.weights, files.name, recognise)
    if files.tokenizer_weights:
        load_weights(model.tokenizer, files.tokenizer_weights, f"the tokenizer of {files.name}", recognise)
    model.tokenizer.requires_grad_(False)
    return model.eval()


def load_model(
    name: str, weights: str = "base", tokenizer_weights: str | None = None, image_size: int | None = None
) -> ARImageModel:
    """Transformer and tokenizer by name; arguments and errors as in ``locate`` and ``load_files``."""
    return load_files(locate(name, weights, tokenizer_weights, image_size))


@functools.cache
def _all_modules() -> dict[str, tuple[type[ARImageModel], nn.Module]]:
    """Transformers and tokenizers of the zoo without weights, and whose they are."""
    modules: dict[str, tuple[type[ARImageModel], nn.Module]] = {}
    for name, entry in ZOO.items():
        modules[name] = (entry.backbone, build_model(name).transformer)
    for tokenizer, row in TOKENIZERS.items():
        user = model_names(row.backbone)[0]
        modules[f"the tokenizer {tokenizer}"] = (
            row.backbone,
            build_model(user, tokenizer=tokenizer).tokenizer,
        )
    return modules


def recognise(state: dict[str, Tensor]) -> str | None:
    """Which model or tokenizer of the zoo a state dict belongs to, by keys and shapes."""
    return next((name for name, (_, module) in _all_modules().items() if not mismatch(module, state)), None)


def published_key(state: dict[str, Tensor]) -> str:
    """Under which key published files of its backbone keep such a state dict; "" is bare.

    The backbone is that of the zoo's module with the most keys in common.
    """
    backbone, module = max(
        _all_modules().values(), key=lambda row: len(state.keys() & row[1].state_dict().keys())
    )
    return backbone.checkpoint_key if state.keys() & module.state_dict().keys() else ""
