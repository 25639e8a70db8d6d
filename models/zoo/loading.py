"""Finding and loading models of the zoo: by name, from the hub or from files."""

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
    """Return the number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def model_names(backbone: type[ARImageModel] | None = None) -> list[str]:
    """Return the names of the zoo's models, of one backbone or of all."""
    return [name for name, entry in ZOO.items() if backbone in (None, entry.backbone)]


def zoo_entry(name: str) -> ZooEntry:
    """Return the zoo's entry of that name. Raises UserError for an unknown name."""
    if name not in ZOO:
        raise UserError(f"--model: {name!r} is not one of {', '.join(ZOO)}")
    return ZOO[name]


@dataclass(frozen=True)
class LocatedFile:
    """A weights file that was looked up once, so that its hash is computed only once.

    option: the option that selects the file.
    argument: the value of that option.
    name: the file's name in messages.
    path: the file on this machine; None for a published file that must be downloaded.
    expected_sha256: the hash that the file must have, or None.
    expected_by: the run that was trained with a file of that hash.
    """

    option: str
    argument: str
    name: str
    path: Path | None
    published: WeightsFile | None = None
    expected_sha256: str | None = None
    expected_by: str | None = None

    @property
    def address(self) -> str:
        """Value of the option that selects this file from any folder: published name or absolute path."""
        return self.argument if self.published or not self.path else str(self.path.absolute())

    @functools.cached_property
    def sha256(self) -> str | None:
        """SHA-256 of the file, None if it is not on this machine. Hashing a large file takes seconds."""
        return weights_sha256(self.path) if self.path else None

    def fetch(self) -> "LocatedFile":
        """Return the file with its path; download it first if it is not on this machine. Raises UserError."""
        if self.path or not self.published:
            return self
        return replace(self, path=self.published.fetch(self.option)).check_hash()

    def check_hash(self) -> "LocatedFile":
        """Return self. Raises UserError if the file is on this machine and has a wrong hash."""
        if self.expected_sha256 and self.sha256 not in (None, self.expected_sha256):
            raise UserError(
                f"{self.option}: {self.name} has another SHA-256 than the file that {self.expected_by} "
                f"was trained with ({self.expected_sha256}); give the path of that file"
            )
        return self

    def text(self) -> str:
        """Return the description of the file in a plan."""
        label = self.name if self.argument == self.name else f"{self.argument}: {self.name}"
        return f"{label}, sha256 {self.sha256[:12]}" if self.sha256 else f"{label}, to be downloaded"


@dataclass(frozen=True)
class ModelFiles:
    """A model of the zoo with its image size, tokenizer and two weights files.

    transformer_file: None if only the tokenizer is needed.
    tokenizer_file: None if the tokenizer has no weights.
    config: config.json of the run that wrote the weights; empty for other weights.
    """

    name: str
    image_size: int
    tokenizer: str
    transformer_file: LocatedFile | None
    tokenizer_file: LocatedFile | None
    config: Mapping[str, Any]

    def build(self) -> ARImageModel:
        """Return the model without weights, as ``build_model`` does."""
        return build_model(self.name, self.image_size, self.tokenizer)

    def fetch(self) -> "ModelFiles":
        """Return a copy with all files on this machine. Raises UserError if a download fails."""
        transformer, tokenizer = self.transformer_file, self.tokenizer_file
        return replace(
            self,
            transformer_file=transformer and transformer.fetch(),
            tokenizer_file=tokenizer and tokenizer.fetch(),
        )

    def load_into(self, model: ARImageModel) -> "ModelFiles":
        """Fetch the files, load them into the model of ``build``, and return what ``fetch`` returns.

        Afterwards the model is on the CPU, in evaluation mode, memory-mapped if the file allows it. Raises
        UserError for a file that cannot be downloaded, is damaged or belongs to another model.
        """
        files = self.fetch()
        for module, file, what in (
            (model.transformer, files.transformer_file, self.name),
            (model.tokenizer, files.tokenizer_file, f"the tokenizer of {self.name}"),
        ):
            if file and file.path:
                load_weights(module, file.path, what, recognise)
        model.tokenizer.requires_grad_(False)
        model.eval()
        return files

    def provenance(self) -> dict:
        """Return the provenance for config.json and samples.json, without hashes of missing files."""
        record = {
            "model": self.name,
            "image_size": self.image_size,
            "weights": self.transformer_file and self.transformer_file.argument,
            "weights_sha256": self.transformer_file and self.transformer_file.sha256,
            "tokenizer_sha256": self.tokenizer_file and self.tokenizer_file.sha256,
        }
        return {key: value for key, value in record.items() if value is not None}

    def plan(self, model: ARImageModel) -> dict[str, str]:
        """Return the rows that a command prints before its work (see ``cca.cli.plan``)."""
        rows = {"model": f"{self.name}, {count_parameters(model.transformer) / 1e6:,.1f} M parameters, "
                f"{self.image_size} x {self.image_size} pixels, {model.sequence_length} tokens"}  # fmt: skip
        if self.transformer_file:
            rows["weights"] = self.transformer_file.text()
        if self.tokenizer_file:
            rows["tokenizer"] = self.tokenizer_file.text()
        return rows

    def downloads(self, model: ARImageModel) -> list[Download]:
        """Return the files that ``fetch`` would download, with their approximate sizes."""
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
    """Return the files of a model, without network access.

    Args:
        name: a model of the zoo, such as "var-d16".
        weights: "base", "cca", a path, a file on the hub (hf://ORG/REPO/FILE[@REVISION]), or a training run
            (see ``run_weights``); None: only the tokenizer is needed.
        tokenizer_weights: a path, a file on the hub, or a name in ``TOKENIZERS``; None: that of the run, or
            the model's own.
        image_size: pixels; None: that of the run, or the model's default.

    Raises:
        UserError: a name, size or file is unknown, or differs from that of the run.
    """
    entry = zoo_entry(name)
    path = None if weights is None else run_weights(weights, entry.backbone.checkpoint_name)
    config = run_config(path) if path else {}
    options = config.get("options", {})
    if options.get("model", name) != name:
        raise UserError(f"--weights: {weights} is a run of {options['model']}, not of {name}")
    run_size = options.get("image_size")
    if run_size and image_size not in (None, run_size):
        raise UserError(f"--image-size: {weights} was trained at {run_size} pixels, not at {image_size}")
    size = image_size or run_size or entry.default_image_size
    if size not in entry.base:
        sizes = ", ".join(map(str, entry.base))
        raise UserError(f"--image-size: {size} is not an image size of {name} ({sizes} pixels)")
    published = {"base": entry.base[size], "cca": entry.cca.get(size)}
    if weights in published and published[weights] is None:
        raise UserError(
            f"--weights: no {weights} weights are published for {name} at {size} pixels; give a path"
        )
    transformer_file = None
    if weights is not None:
        run_file = LocatedFile("--weights", weights, str(path), path)
        transformer_file = run_file if path else _locate("--weights", weights, published)
    tokenizer = tokenizer_weights or config.get("tokenizer") or entry.tokenizer
    return ModelFiles(
        name,
        size,
        tokenizer if tokenizer in TOKENIZERS else entry.tokenizer,
        transformer_file,
        _locate_tokenizer(name, tokenizer, options.get("tokenizer_sha256"), weights),
        config,
    )


def _locate_tokenizer(model: str, tokenizer: str, sha256: str | None, run: str | None) -> LocatedFile | None:
    """Return the file of a tokenizer name or path. Raises UserError if ``run`` recorded another SHA-256."""
    names = [name for name, row in TOKENIZERS.items() if row.backbone is ZOO[model].backbone]
    if tokenizer in TOKENIZERS and tokenizer not in names:
        raise UserError(
            f"--tokenizer-weights: {tokenizer} is not a tokenizer of {model}; choose from {', '.join(names)}"
        )
    try:
        file = _locate("--tokenizer-weights", tokenizer, {name: TOKENIZERS[name].weights for name in names})
    except UserError as error:
        hint = f"; {run} was trained with the file of SHA-256 {sha256}" if sha256 else ""
        raise UserError(f"{error}{hint}") from None
    return replace(file, expected_sha256=sha256, expected_by=run).check_hash() if file and sha256 else file


def _locate(option: str, text: str, published: Mapping[str, WeightsFile | None]) -> LocatedFile | None:
    """Return the file of a published name, hub address or path. Raises UserError if there is no such file."""
    if text in published or text.startswith(HUB):
        file = published[text] if text in published else WeightsFile.from_address(text, option)
        return LocatedFile(option, text, str(file), file.cached(), file) if file else None
    if not Path(text).exists():
        raise UserError(
            f"{option}: {text}: no such file; give a path, one of {', '.join(published)}, or {HUB}…"
        )
    return LocatedFile(option, str(Path(text)), str(Path(text)), Path(text))


def build_model(
    name: str, image_size: int | None = None, tokenizer: str | None = None, device: str = "meta"
) -> ARImageModel:
    """Return the model without weights: parameters on ``device``, constant buffers on the CPU."""
    entry = zoo_entry(name)
    config = TOKENIZERS[tokenizer or entry.tokenizer].config
    with torch.device(device):
        return entry.backbone.build(entry.transformer, config, image_size or entry.default_image_size)


def load_model(
    name: str, weights: str = "base", tokenizer_weights: str | None = None, image_size: int | None = None
) -> ARImageModel:
    """Return a model with its weights.

    Arguments are those of ``find_files``. Raises the errors of ``find_files`` and ``ModelFiles.load_into``.
    """
    files = find_files(name, weights, tokenizer_weights, image_size)
    model = files.build()
    files.load_into(model)
    return model


def build_tokenizer(name: str) -> ImageTokenizer:
    """Return a tokenizer of the zoo without weights."""
    return build_model(model_names(TOKENIZERS[name].backbone)[0], tokenizer=name).tokenizer


@functools.cache
def _all_modules() -> dict[str, tuple[type[ARImageModel], nn.Module]]:
    """Return all transformers and tokenizers of the zoo as {name: (backbone, module without weights)}."""
    transformers = {name: (entry.backbone, build_model(name).transformer) for name, entry in ZOO.items()}
    tokenizers = {
        f"the tokenizer {name}": (row.backbone, build_tokenizer(name)) for name, row in TOKENIZERS.items()
    }
    return {**transformers, **tokenizers}


def recognise(state: dict[str, Tensor]) -> str | None:
    """Return the name of the model or tokenizer whose keys and shapes a state dict has, else None."""
    return next((name for name, (_, module) in _all_modules().items() if not mismatch(module, state)), None)


def published_key(state: dict[str, Tensor]) -> str:
    """Return the key under which published files keep such a state dict; "" means no key.

    The zoo's module with the most keys in common decides the backbone.
    """
    backbone, module = max(
        _all_modules().values(), key=lambda row: len(state.keys() & row[1].state_dict().keys())
    )
    return backbone.checkpoint_key if state.keys() & module.state_dict().keys() else ""
