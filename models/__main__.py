"""List the model zoo: sizes, published FIDs, and where the weights are.

    python -m models
    python -m models --json > models.json

FID-50k values are the published ones, on ImageNet. "FID base" and "FID CCA" are without guidance, "FID
guided" is the base at guidance scale s. LlamaGen samples have 384 pixels and are resized to 256. The last
columns say where the weights are: "cached" files are in the cache of huggingface_hub, files on the "hub"
are downloaded at first use, and "–" means not published. File sizes are estimated from the number of
parameters.

--json prints more: every published figure with its sampling settings, the recipes by loss, and for each
weights file its repository, address, path on this machine (null if it is not there) and approximate size
in bytes.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from cca.cli.main import run_command
from cca.cli.parser import Parser
from models.utils.files import size_text
from models.zoo.checkpoint_formats import approximate_size
from models.zoo.hub import WeightsFile
from models.zoo.loading import build_model, build_tokenizer, count_parameters
from models.zoo.registry import TOKENIZERS, ZOO, TokenizerEntry, ZooEntry


def model_facts(name: str, entry: ZooEntry) -> dict[str, Any]:
    """Return the JSON record of a model."""
    models = {size: build_model(name, size) for size in entry.base}
    return {
        "backbone": entry.backbone.family,
        "parameters": count_parameters(models[entry.default_image_size].transformer),
        "tokenizer": entry.tokenizer,
        "default_image_size": entry.default_image_size,
        "image_sizes": [
            {
                "pixels": size,
                "tokens": model.sequence_length,
                "weights": {
                    "base": file_facts(entry.base[size], model.transformer),
                    "cca": file_facts(entry.cca.get(size), model.transformer),
                },
            }
            for size, model in models.items()
        ],
        "published": asdict(entry.published) if entry.published else None,
        "recipes": {loss: asdict(recipe) for loss, recipe in entry.recipes.items()},
    }


def tokenizer_facts(name: str, entry: TokenizerEntry) -> dict[str, Any]:
    """Return the JSON record of a tokenizer; ``models`` lists the models that use it by default."""
    tokenizer = build_tokenizer(name)
    return {
        "backbone": entry.backbone.family,
        "parameters": count_parameters(tokenizer),
        "codebook": entry.config.vocab_size,
        "pixels_per_token": entry.config.autoencoder.downsampling,
        "models": [model for model, row in ZOO.items() if row.tokenizer == name],
        "weights": file_facts(entry.weights, tokenizer),
    }


def file_facts(file: WeightsFile | None, module: nn.Module) -> dict[str, Any] | None:
    """Return the JSON record of a weights file, None if there is no file.

    If the file is not on this machine, ``path`` is None and the size is an estimate.
    """
    if file is None:
        return None
    path, page = file.cached(), f"https://huggingface.co/{file.repository}/resolve/main/{file.file}"
    return {
        "repository": file.repository,
        "file": file.file,
        "address": page if file.repository else None,
        "path": path and str(path),
        "approximate_bytes": path.stat().st_size if path else approximate_size(module),
    }


def model_rows(name: str, model: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the rows of the first table: one for each image size of a model."""
    for size in model["image_sizes"]:
        published = model["published"] or {"figures": {}}
        # The published figures are of the default size.
        figures = published["figures"] if size["pixels"] == model["default_image_size"] else {}
        fids = {kind: f"{values['fid']:.2f}" for kind, values in figures.items()}
        guided = f"{fids['guided']} (s={published['cfg_scale']:g})" if "guided" in fids else "–"
        yield {
            "model": name,
            "parameters": f"{model['parameters'] / 1e6:,.1f} M",
            "pixels": str(size["pixels"]),
            "tokens": str(size["tokens"]),
            "FID base": fids.get("base", "–"),
            "FID guided": guided,
            "FID CCA": fids.get("cca", "–"),
            "base": location_text(size["weights"]["base"]),
            "cca": location_text(size["weights"]["cca"]),
        }


def tokenizer_row(name: str, tokenizer: dict[str, Any]) -> dict[str, str]:
    """Return a row of the second table."""
    return {
        "tokenizer": name,
        "parameters": f"{tokenizer['parameters'] / 1e6:,.1f} M",
        "codebook": str(tokenizer["codebook"]),
        "pixels per token": f"{tokenizer['pixels_per_token']} x {tokenizer['pixels_per_token']}",
        "weights": location_text(tokenizer["weights"]),
        "models": ", ".join(tokenizer["models"])
        or f"{tokenizer['backbone']}, with --tokenizer-weights {name}",
    }


def location_text(file: dict[str, Any] | None) -> str:
    """Return "bundled", "cached", "hub" with the approximate size, or "–" if there is no file."""
    if file is None:
        return "–"
    if not file["path"]:
        return f"hub, ~{size_text(file['approximate_bytes'])}"
    return "cached" if file["repository"] else "bundled"


def align_columns(rows: Sequence[dict[str, str]], left: Collection[str]) -> str:
    """Return the rows as a text table: columns in ``left`` are left-aligned, the others right-aligned."""
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]}
    lines = [
        "  ".join(row[c].ljust(w) if c in left else row[c].rjust(w) for c, w in widths.items()).rstrip()
        for row in (dict(zip(widths, widths)), *rows)
    ]
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser(__doc__, "models.__main__")
    parser.add_argument("--json", action="store_true", help="print JSON with all details to standard output")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    models = {name: model_facts(name, entry) for name, entry in ZOO.items()}
    tokenizers = {name: tokenizer_facts(name, entry) for name, entry in TOKENIZERS.items()}
    if args.json:
        print(json.dumps({"models": models, "tokenizers": tokenizers}, indent=2, allow_nan=False))
        return
    rows = [row for name, model in models.items() for row in model_rows(name, model)]
    print(align_columns(rows, left=("model", "base", "cca")))
    rows = [tokenizer_row(name, tokenizer) for name, tokenizer in tokenizers.items()]
    print("\n" + align_columns(rows, left=("tokenizer", "weights", "models")))
    print("\n" + __doc__.split("\n\n")[2].strip())


if __name__ == "__main__":
    run_command(main)
