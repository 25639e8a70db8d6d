"""The zoo as tables and as JSON: for ``python -m models``, README and docs/models.md."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from torch import nn

from models.files import finite_or_none
from models.hub import WeightsFile
from models.loading import build_model, model_names
from models.plan import numbers, parameter_count, size_text
from models.tables import markdown_table
from models.weights import approximate_size
from models.zoo import TOKENIZERS, ZOO, TokenizerEntry, ZooEntry

SAMPLED = {  # the rows of a model's published figures; "{s}": its guidance scale
    "base": "base",
    "guided": "base, guided (s={s})",
    "cca": "CCA",
    "dpo": "DPO",
    "unlearning": "unlearning",
}
METRICS = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "precision", "recall": "recall"}


def zoo_rows() -> list[dict[str, str]]:
    """One row per model and image size, ready to print."""
    return [zoo_row(name, size) for name, entry in ZOO.items() for size in entry.base]


def zoo_row(name: str, size: int) -> dict[str, str]:
    entry, model = ZOO[name], build_model(name, size)
    return {
        "model": name,
        "parameters": parameter_count(model.transformer),
        "pixels": str(size),
        "tokens": str(model.sequence_length),
        **published_columns(entry, size),
        "base": where(entry.base[size], model.transformer),
        "cca": where(entry.cca.get(size), model.transformer),
    }


def tokenizer_rows() -> list[dict[str, str]]:
    """One row per tokenizer, ready to print."""
    rows = []
    for name, entry in TOKENIZERS.items():
        tokenizer = build_tokenizer(name, entry)
        rows.append({
            "tokenizer": name,
            "parameters": parameter_count(tokenizer),
            "codebook": str(entry.config.vocab_size),
            "pixels per token": " x ".join(2 * [str(entry.config.autoencoder.downsampling)]),
            "weights": where(entry.weights, tokenizer),
            "models": ", ".join(users(name)) or f"{entry.backbone.family}, with --tokenizer-weights {name}",
        })  # fmt: skip
    return rows


def users(tokenizer: str) -> list[str]:
    """Models whose own tokenizer it is."""
    return [name for name, entry in ZOO.items() if entry.tokenizer == tokenizer]


def build_tokenizer(name: str, entry: TokenizerEntry) -> nn.Module:
    return build_model(model_names(entry.backbone)[0], tokenizer=name).tokenizer


def published_columns(entry: ZooEntry, size: int) -> dict[str, str]:
    """Published FID-50k figures; they were taken at the model's default image size."""
    figures = entry.published if size == entry.default_image_size else None
    base, guided, cca = (figures and figures.fid(sampled) for sampled in ("base", "guided", "cca"))
    scale = f" (s={figures.cfg_scale:g})" if figures and guided else ""
    shown = ["–" if value is None else f"{value:.2f}" for value in (base, guided, cca)]
    return dict(zip(("FID base", "FID guided", "FID CCA"), (shown[0], shown[1] + scale, shown[2])))


def where(file: WeightsFile | None, module: nn.Module) -> str:
    if file is None:
        return "–"
    if file.repository is None:
        return "bundled"
    return "cached" if file.cached() else f"hub, {about(module)}"


def about(module: nn.Module) -> str:
    """About how large a file of the module's weights is."""
    return f"~{size_text(approximate_size(module))}"


def published_models() -> Iterator[tuple[str, ZooEntry]]:
    """All but those that are bundled."""
    for name, entry in ZOO.items():
        if any(file is None or file.repository for file in entry.base.values()):
            yield name, entry


def link(file: WeightsFile | None, text: str | None = None) -> str:
    return f"[{text or file.file.rpartition('/')[2]}]({file.page})" if file else "–"


def models_table() -> str:
    """README's table: FID at the default image size, and the pages of the weights."""
    rows = []
    for name, entry in published_models():
        size = entry.default_image_size
        row, files = zoo_row(name, size), ((entry.base[size], "base"), (entry.cca.get(size), "CCA"))
        links = ", ".join(link(file, text) for file, text in files if file)
        columns = ("model", "parameters", "pixels", "FID base", "FID guided", "FID CCA")
        rows.append([*(row[column] for column in columns), links or "–"])
    header = ("model", "parameters", "pixels", "FID base", "FID guided", "FID CCA, no guidance", "weights")
    return markdown_table(header, rows)


def figures_table() -> str:
    """Every published figure: a row for each model and what was sampled of it."""
    rows = []
    for name, entry in published_models():
        figures = entry.published.figures if entry.published else {}
        for sampled, title in SAMPLED.items():
            if entry.published and sampled in figures:
                values = [
                    "–" if (value := figures[sampled].get(metric)) is None
                    else f"{value:.1f}" if metric == "is" else f"{value:.2f}"
                    for metric in METRICS
                ]  # fmt: skip
                rows.append([name, title.format(s=f"{entry.published.cfg_scale:g}"), *values])
    return markdown_table(("model", "sampled", *METRICS.values()), rows)


def figures_notes() -> str:
    """What the sources say otherwise, or not at all."""
    notes: dict[str, list[str]] = {}
    for name, entry in published_models():
        for note in entry.published.notes if entry.published else ():
            notes.setdefault(note, []).append(name)
    return "\n".join(f"- {', '.join(names)}: {note}." for note, names in notes.items())


def files_table() -> str:
    """Every published weights file with its size, computed from the parameters."""
    rows = []
    for name, entry in published_models():
        for size, base in entry.base.items():
            cca = entry.cca.get(size)
            if base or cca:
                size_shown = about(build_model(name, size).transformer)
                more = entry.published.with_guidance if entry.published and cca else None
                folder = f"[folder]({more})" if more else "–"
                rows.append([name, str(size), size_shown, link(base), link(cca), folder])
    for name, row in TOKENIZERS.items():
        if row.weights and row.weights.repository:
            size_shown = about(build_tokenizer(name, row))
            rows.append([f"{name} (tokenizer)", "", size_shown, link(row.weights), "–", "–"])
    return markdown_table(("model", "pixels", "size", "base", "CCA", "CCA for guidance on top"), rows)


def catalogue() -> dict[str, Any]:
    """All of it for machines: JSON's types alone, without NaN."""
    return finite_or_none({
        "models": {name: _model(name, entry) for name, entry in ZOO.items()},
        "tokenizers": {name: _tokenizer(name, entry) for name, entry in TOKENIZERS.items()},
    })  # fmt: skip


def _model(name: str, entry: ZooEntry) -> dict[str, Any]:
    models = {size: build_model(name, size) for size in entry.base}
    return {
        "backbone": entry.backbone.family,
        "parameters": numbers(models[entry.default_image_size].transformer),
        "tokenizer": entry.tokenizer,
        "default_image_size": entry.default_image_size,
        "image_sizes": [
            {
                "pixels": size,
                "tokens": model.sequence_length,
                "weights": {
                    "base": _file(entry.base[size], model.transformer),
                    "cca": _file(entry.cca.get(size), model.transformer),
                },
            }
            for size, model in models.items()
        ],
        "published": asdict(entry.published) if entry.published else None,
        "recipes": {loss: asdict(recipe) for loss, recipe in entry.recipes.items()},
    }


def _tokenizer(name: str, entry: TokenizerEntry) -> dict[str, Any]:
    tokenizer = build_tokenizer(name, entry)
    return {
        "backbone": entry.backbone.family,
        "parameters": numbers(tokenizer),
        "codebook": entry.config.vocab_size,
        "pixels_per_token": entry.config.autoencoder.downsampling,
        "models": users(name),
        "weights": _file(entry.weights, tokenizer),
    }


def _file(file: WeightsFile | None, module: nn.Module) -> dict[str, Any] | None:
    """A weights file; ``path``: where it is on this machine, null where it is not and its size a guess."""
    if file is None:
        return None
    path = file.cached()
    return {
        "repository": file.repository,
        "file": file.file,
        "address": file.address,
        "path": path and str(path),
        "approximate_bytes": path.stat().st_size if path else approximate_size(module),
    }
