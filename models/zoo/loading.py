"""Finding and loading models of the zoo: by name, from the hub, from files."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor, nn

from models.base import ARImageModel, ImageTokenizer
from models.utils.errors import UserError
from models.zoo.checkpoint_formats import (
    approximate_size,
    load_weights,
    mismatch,
    weights_sha256,
)
from models.zoo.hub import HUB, Download, WeightsFile
from models.zoo.registry import TOKENIZERS, ZOO, ZooEntry
from models.zoo.run_folders import run_config, run_weights


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def model_names(backbone: type[ARImageModel] | None = None) -> list[str]:
    """The zoo's models, of one backbone or all."""
    return [name for name, entry in ZOO.items() if backbone in (None, entry.backbone)]


def zoo_entry(name: str) -> ZooEntry:
    """Return the zoo's row of that name. Raises UserError where there is none."""
    if name not in ZOO:
        raise UserError(f"--model: {name!r} is not one of {', '.join(ZOO)}")
    return ZOO[name]


@dataclass(frozen=True)
class LocatedFile:
    """A weights file that was looked up once, so that its hash is computed once.

    option: where a user may give a path. given: what the user gave there. name: as messages call the file.
    path: where it is on this machine; None for a published file that is to be downloaded.
    expected_sha256: the hash that the file must have; expected_by: the run that was trained with it.
    """

    option: str
    given: str
    name: str
    path: Path | None
    published: WeightsFile | None = None
    expected_sha256: str | None = None
    expected_by: str | None = None

    @property
    def address(self) -> str:
        """What a user would give to get this file from any folder: its published name, or its path."""
        return self.given if self.published or not self.path else str(self.path.absolute())

    @functools.cached_property
    def sha256(self) -> str | None:
        """Hash of a file that is on this machine; of large files it takes seconds."""
        return weights_sha256(self.path) if self.path else None

    def fetch(self) -> "LocatedFile":
        """Return the file on this machine, downloaded if need be. Raises UserError."""
        if self.path or not self.published:
            return self
        return replace(self, path=self.published.fetch(self.option)).checked()

    def checked(self) -> "LocatedFile":
        """Return the same. Raises UserError where the file is here and has another hash than it must have."""
        if self.expected_sha256 and self.sha256 not in (None, self.expected_sha256):
            raise UserError(
                f"{self.option}: {self.name} has another SHA-256 than the file that {self.expected_by} "
                f"was trained with, {self.expected_sha256}; give the path of that one"
            )
        return self

    def text(self) -> str:
        """Return what a plan shows."""
        shown = self.name if self.given == self.name else f"{self.given}: {self.name}"
        return f"{shown}, sha256 {self.sha256[:12]}" if self.sha256 else f"{shown}, to be downloaded"


@dataclass(frozen=True)
class ModelFiles:
    """What a model is made of: its row, image size, tokenizer and the two weights files.

    transformer_file: None where the tokenizer alone is needed. tokenizer_file: None where it has no weights.
    config: config.json of the run that the weights are of; empty for others.
    """

    name: str
    image_size: int
    tokenizer: str
    transformer_file: LocatedFile | None
    tokenizer_file: LocatedFile | None
    config: Mapping[str, Any]

    def build(self) -> ARImageModel:
        """The model without weights, as ``build_model`` makes it."""
        return build_model(self.name, self.image_size, self.tokenizer)

    def fetch(self) -> "ModelFiles":
        """The same with all files on this machine. Raises UserError for one that cannot be had."""
        transformer, tokenizer = self.transformer_file, self.tokenizer_file
        return replace(
            self,
            transformer_file=transformer and transformer.fetch(),
            tokenizer_file=tokenizer and tokenizer.fetch(),
        )

    def load_into(self, model: ARImageModel) -> "ModelFiles":
        """Fetch the files and give the model that they built its weights, mapped where a file allows it.

        The model is then on the CPU, in evaluation mode. Returns what ``fetch`` does. Raises UserError for
        a file that cannot be had, is broken or of another model.
        """
        fetched = self.fetch()
        for module, file, what in (
            (model.transformer, fetched.transformer_file, self.name),
            (model.tokenizer, fetched.tokenizer_file, f"the tokenizer of {self.name}"),
        ):
            if file and file.path:
                load_weights(module, file.path, what, recognise)
        model.tokenizer.requires_grad_(False)
        model.eval()
        return fetched

    def provenance(self) -> dict:
        """Provenance for config.json and samples.json, without the hashes of files that are not here yet."""
        known = {
            "model": self.name,
            "image_size": self.image_size,
            "weights": self.transformer_file and self.transformer_file.given,
            "weights_sha256": self.transformer_file and self.transformer_file.sha256,
            "tokenizer_sha256": self.tokenizer_file and self.tokenizer_file.sha256,
        }
        return {key: value for key, value in known.items() if value is not None}

    def plan(self, model: ARImageModel) -> dict[str, str]:
        """Return what is shown before the work (see ``cca.cli.plan``)."""
        rows = {"model": f"{self.name}, {count_parameters(model.transformer) / 1e6:,.1f} M parameters, "
                f"{self.image_size} x {self.image_size} pixels, {model.sequence_length} tokens"}  # fmt: skip
        if self.transformer_file:
            rows["weights"] = self.transformer_file.text()
        if self.tokenizer_file:
            rows["tokenizer"] = self.tokenizer_file.text()
        return rows

    def downloads(self, model: ARImageModel) -> list[Download]:
        """Files that ``fetch`` would download, and about how large they are."""
        files = ((self.transformer_file, model.transformer), (self.tokenizer_file, model.tokenizer))
        return [
            Download(file.name, approximate_size(module), Path(constants.HF_HUB_CACHE), file.option)
            for file, module in files
            if file and not file.path
        ]


def find_files(
    name: str,
    weights: str | None = "base",
    tokenizer_weights: str | None = None,
    image_size: int | None = None,
) -> ModelFiles:
    """The files of a model, without network.

    Args:
        name: a model of the zoo, such as "var-d16".
        weights: "base", "cca", a path (.pt, .pth, .safetensors), a file on the hub
            (hf://ORG/REPO/FILE[@REVISION]), or a training run (see ``run_weights``), whose size and tokenizer
            are taken; None: the tokenizer alone is needed.
        tokenizer_weights: a path, a file on the hub, or a name of ``TOKENIZERS``; None takes the run's, or
            the model's own.
        image_size: pixels; None takes the run's, or the model's default.

    Raises:
        UserError: an unknown name, size or file, or others than those of the run.
    """
    entry = zoo_entry(name)
    path = None if weights is None else run_weights(weights, entry.backbone.checkpoint_name)
    config = run_config(path) if path else {}
    options = config.get("options", {})
    if options.get("model", name) != name:
        raise UserError(f"--weights: {weights} is a run of {options['model']}, not of {name}")
    trained = options.get("image_size")
    if trained and image_size not in (None, trained):
        raise UserError(f"--image-size: {weights} was trained at {trained} pixels, not at {image_size}")
    size = image_size or trained or entry.default_image_size
    if size not in entry.base:
        raise UserError(
            f"--image-size: {name} makes images of {', '.join(map(str, entry.base))} pixels, not {size}"
        )
    published = {"base": entry.base[size], "cca": entry.cca.get(size)}
    if weights in published and published[weights] is None:
        raise UserError(
            f"--weights: no {weights} weights are published for {name} at {size} pixels; give a path"
        )
    transformer_file = None
    if weights is not None:
        located = LocatedFile("--weights", weights, str(path), path)
        transformer_file = located if path else _locate("--weights", weights, published)
    given = tokenizer_weights or config.get("tokenizer") or entry.tokenizer
    return ModelFiles(
        name,
        size,
        given if given in TOKENIZERS else entry.tokenizer,
        transformer_file,
        _locate_tokenizer(name, given, options.get("tokenizer_sha256"), weights),
        config,
    )


def _locate_tokenizer(model: str, given: str, sha256: str | None, run: str | None) -> LocatedFile | None:
    """Find a tokenizer by name or path. Raises UserError if ``run`` notes another hash, ``sha256``."""
    names = [name for name, row in TOKENIZERS.items() if row.backbone is ZOO[model].backbone]
    if given in TOKENIZERS and given not in names:
        raise UserError(
            f"--tokenizer-weights: {given} is no tokenizer of {model}; there are {', '.join(names)}"
        )
    try:
        file = _locate("--tokenizer-weights", given, {name: TOKENIZERS[name].weights for name in names})
    except UserError as error:
        trained_with = f"; {run} was trained with the file of SHA-256 {sha256}" if sha256 else ""
        raise UserError(f"{error}{trained_with}") from None
    return replace(file, expected_sha256=sha256, expected_by=run).checked() if file and sha256 else file


def _locate(option: str, text: str, published: Mapping[str, WeightsFile | None]) -> LocatedFile | None:
    """Return the file of that name, on the hub or at that path. Raises UserError where nothing is there."""
    if text in published or text.startswith(HUB):
        file = published[text] if text in published else WeightsFile.from_address(text, option)
        return LocatedFile(option, text, str(file), file.cached(), file) if file else None
    if not Path(text).exists():
        raise UserError(f"{option}: {text}: no such file, nor one of {', '.join(published)}, nor {HUB}…")
    return LocatedFile(option, str(Path(text)), str(Path(text)), Path(text))


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
    files.load_into(model)
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
