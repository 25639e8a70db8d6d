"""Finding and loading models of the zoo: by name, from the hub, from files."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import constants
from torch import Tensor, nn

from models.base import ARImageModel, ImageTokenizer
from models.utils.errors import UserError
from models.zoo.checkpoint_formats import (
    approximate_size,
    load_weights,
    mismatch,
    weights_files,
    weights_sha256,
)
from models.zoo.hub import Download, WeightsFile
from models.zoo.registry import TOKENIZERS, ZOO, ZooEntry

WEIGHTS_OPTIONS = ("--weights", "--tokenizer-weights")


def numbers(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def parameter_count(module: nn.Module) -> str:
    return f"{numbers(module) / 1e6:,.1f} M"


def model_names(backbone: type[ARImageModel] | None = None) -> list[str]:
    """The zoo's models, of one backbone or all."""
    return [name for name, entry in ZOO.items() if backbone in (None, entry.backbone)]


def zoo_entry(name: str) -> ZooEntry:
    """Return the zoo's row of that name. Raises UserError where there is none."""
    if name not in ZOO:
        raise UserError(f"--model: {name!r} is not one of {', '.join(ZOO)}")
    return ZOO[name]


@dataclass(frozen=True)
class ModelFiles:
    """What a model is made of: its row, image size, tokenizer and the two weights files (None: not needed).

    A WeightsFile may have to be downloaded yet; ``fetch`` does it, and leaves paths alone.
    """

    name: str
    image_size: int
    tokenizer: str
    weights: Path | WeightsFile | None
    tokenizer_weights: Path | WeightsFile | None

    def fetch(self) -> "ModelFiles":
        """The same with all files on this machine. Raises UserError for one that cannot be had."""
        weights, tokenizer = (
            file.fetch(option) if isinstance(file, WeightsFile) else file
            for option, file in zip(WEIGHTS_OPTIONS, (self.weights, self.tokenizer_weights))
        )
        return replace(self, weights=weights, tokenizer_weights=tokenizer)

    def build(self) -> ARImageModel:
        """The model without weights, as ``build_model`` makes it."""
        return build_model(self.name, self.image_size, self.tokenizer)

    def fill(self, model: ARImageModel) -> "ModelFiles":
        """Fetch the files and give the model that they built its weights, mapped where a file allows it.

        The model is then on the CPU, in evaluation mode. Returns what ``fetch`` does. Raises UserError for
        a file that cannot be had, is broken or of another model.
        """
        fetched = self.fetch()
        for module, file, what in (
            (model.transformer, fetched.weights, self.name),
            (model.tokenizer, fetched.tokenizer_weights, f"the tokenizer of {self.name}"),
        ):
            if isinstance(file, Path):
                load_weights(module, file, what, recognise)
        model.tokenizer.requires_grad_(False)
        model.eval()
        return fetched

    def describe(self) -> dict:
        """Provenance for config.json and samples.json, of files that are here."""
        return {
            "model": self.name,
            "image_size": self.image_size,
            "weights_sha256": _sha256(self.weights),
            "tokenizer_sha256": _sha256(self.tokenizer_weights),
        }

    def known(self) -> dict:
        """What ``describe`` says and will say, without the hashes of files that are not here yet."""
        return {key: value for key, value in self.describe().items() if value is not None}

    def plan(self, model: ARImageModel, weights: str | None, instead: str | None = None) -> dict[str, str]:
        """What is shown before the work (see ``cca.cli.plan``); ``weights`` as the user named them.

        instead: what is taken instead of a weights file.
        """
        rows = {"model": f"{self.name}, {parameter_count(model.transformer)} parameters, "
                f"{self.image_size} x {self.image_size} pixels, {model.sequence_length} tokens"}  # fmt: skip
        if instead:
            rows["weights"] = instead
        elif self.weights:
            rows["weights"] = _shown(self.weights, weights)
        if self.tokenizer_weights:
            rows["tokenizer"] = _shown(self.tokenizer_weights)
        return rows

    def downloads(self, model: ARImageModel) -> list[Download]:
        """Files that ``fetch`` would download, and about how large they are."""
        files = (self.weights, self.tokenizer_weights)
        return [
            Download(str(file), approximate_size(module), Path(constants.HF_HUB_CACHE), option)
            for option, file, module in zip(WEIGHTS_OPTIONS, files, (model.transformer, model.tokenizer))
            if isinstance(file, WeightsFile) and not file.cached()
        ]


def _sha256(file: Path | WeightsFile | None) -> str | None:
    """Hash of a file that is on this machine; None for others."""
    path = file.cached() if isinstance(file, WeightsFile) else file
    if path is None:
        return None
    about = [part.stat() for part in weights_files(path)]
    return _hash_once(path, tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in about))


@functools.lru_cache
def _hash_once(path: Path, state: tuple) -> str:
    """Of files in that state: a plan and a record take the hash, which of large files takes seconds."""
    return weights_sha256(path)


def _shown(file: Path | WeightsFile, name: str | None = None) -> str:
    digest = _sha256(file)
    said = f"{name}: {file}" if name and name != str(file) else str(file)
    return f"{said}, sha256 {digest[:12]}" if digest else f"{said}, to be downloaded"


def find_files(
    name: str,
    weights: str | None = "base",
    tokenizer_weights: str | None = None,
    image_size: int | None = None,
) -> ModelFiles:
    """The files of a model, without network.

    Args:
        name: a model of the zoo, such as "var-d16".
        weights: "base", "cca", or a path (.pt, .pth, .safetensors); None: the tokenizer alone is needed.
        tokenizer_weights: a path, or a name of ``TOKENIZERS``; None takes the model's own.
        image_size: pixels; None takes the model's default.

    Raises:
        UserError: an unknown name, size or file.
    """
    entry = zoo_entry(name)
    size = image_size or entry.default_image_size
    if size not in entry.base:
        raise UserError(
            f"--image-size: {name} makes images of {', '.join(map(str, entry.base))} pixels, not {size}"
        )
    published = {"base": entry.base[size], "cca": entry.cca.get(size)}
    if weights in published and published[weights] is None:
        raise UserError(
            f"--weights: no {weights} weights are published for {name} at {size} pixels; give a path"
        )
    given = tokenizer_weights or entry.tokenizer
    tokenizer = given if given in TOKENIZERS else entry.tokenizer
    if TOKENIZERS[tokenizer].backbone is not entry.backbone:
        raise UserError(f"--tokenizer-weights: {tokenizer} is no tokenizer of {name}")
    tokenizers = {n: row.weights for n, row in TOKENIZERS.items() if row.backbone is entry.backbone}
    file = _published_or_path("--weights", weights, published) if weights else None
    tokenizer_file = _published_or_path("--tokenizer-weights", given, tokenizers)
    return ModelFiles(name, size, tokenizer, file, tokenizer_file)


def _published_or_path(
    option: str, text: str, published: Mapping[str, WeightsFile | None]
) -> Path | WeightsFile | None:
    """The published file of that name, else the path; raises UserError where nothing is there."""
    if text in published:
        return published[text]
    if not Path(text).exists():
        raise UserError(f"{option}: {text}: no such file, nor one of {', '.join(published)}")
    return Path(text)


def build_model(
    name: str, image_size: int | None = None, tokenizer: str | None = None, device: str = "meta"
) -> ARImageModel:
    """The model without weights: parameters on ``device``, constant buffers on the CPU."""
    entry = zoo_entry(name)
    config = TOKENIZERS[tokenizer or entry.tokenizer].config
    with torch.device(device):
        return entry.backbone.build(entry.transformer, config, image_size or entry.default_image_size)


def load_model(
    name: str, weights: str = "base", tokenizer_weights: str | None = None, image_size: int | None = None
) -> ARImageModel:
    """Transformer and tokenizer by name; arguments and errors: ``find_files`` and ``ModelFiles.fill``."""
    files = find_files(name, weights, tokenizer_weights, image_size)
    model = files.build()
    files.fill(model)
    return model


def build_tokenizer(name: str) -> ImageTokenizer:
    """A tokenizer of the zoo without weights."""
    return build_model(model_names(TOKENIZERS[name].backbone)[0], tokenizer=name).tokenizer


@functools.cache
def _all_modules() -> dict[str, tuple[type[ARImageModel], nn.Module]]:
    """Transformers and tokenizers of the zoo without weights, and whose they are."""
    transformers = {name: (entry.backbone, build_model(name).transformer) for name, entry in ZOO.items()}
    tokenizers = {
        f"the tokenizer {name}": (row.backbone, build_tokenizer(name)) for name, row in TOKENIZERS.items()
    }
    return {**transformers, **tokenizers}


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
