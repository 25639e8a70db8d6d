"""List the model zoo: sizes, published FIDs, and what is on this machine already.

    python -m models

FID-50k on ImageNet as published: base and CCA without guidance, guided at scale s; LlamaGen at
384 pixels, resized to 256. The last columns say where the weights are: "cached" files are in the
cache of huggingface_hub, those "on the hub" are downloaded when first used, "–" were not published.
"""

from cca.errors import run_command
from cca.options import Parser
from models.hub import WeightsFile
from models.zoo import TOKENIZERS, ZOO, ZooEntry, build_model


def zoo_rows() -> list[dict[str, str]]:
    """One row per model and image size, ready to print."""
    rows = []
    for name, entry in ZOO.items():
        for size in entry.base:
            model = build_model(name, size)
            rows.append({
                "model": name,
                "parameters": parameter_count(model.transformer),
                "pixels": str(size),
                "tokens": str(model.sequence_length),
                **published_columns(entry, size),
                "base": where(entry.base[size]),
                "cca": where(entry.cca.get(size)),
            })  # fmt: skip
    return rows


def tokenizer_rows() -> list[dict[str, str]]:
    """One row per tokenizer, ready to print."""
    rows = []
    for name, entry in TOKENIZERS.items():
        users = [model for model, row in ZOO.items() if row.backbone == entry.backbone]
        usual = [model for model in users if ZOO[model].tokenizer == name]
        rows.append({
            "tokenizer": name,
            "parameters": parameter_count(build_model(users[0], tokenizer=name).tokenizer),
            "codebook": str(entry.config.vocab_size),
            "pixels per token": f"{entry.config.autoencoder.downsampling} x {entry.config.autoencoder.downsampling}",
            "weights": where(entry.weights),
            "models": ", ".join(usual) or f"{entry.backbone}, with --tokenizer-weights {name}",
        })  # fmt: skip
    return rows


def parameter_count(module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:,.1f} M"


def published_columns(entry: ZooEntry, size: int) -> dict[str, str]:
    """Published FID-50k figures; they were taken at the model's default image size."""
    figures = entry.published if size == entry.default_image_size else None
    base, guided, cca = (getattr(figures, field, None) for field in ("base", "guided", "cca"))
    scale = f" (s={figures.cfg_scale:g})" if guided else ""
    show = lambda value: "–" if value is None else f"{value:.2f}"  # noqa: E731
    return {"FID base": show(base), "FID guided": show(guided) + scale, "FID CCA": show(cca)}


def where(file: WeightsFile | None) -> str:
    if file is None:
        return "–"
    if file.repository is None:
        return "bundled"
    return "cached" if file.cached() else "on the hub"


def print_table(rows: list[dict[str, str]], left: tuple[str, ...]) -> None:
    """Columns in ``left`` are aligned there, the others, numbers, to the right."""
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]}
    for row in (dict(zip(widths, widths)), *rows):
        print(
            "  ".join(row[c].ljust(w) if c in left else row[c].rjust(w) for c, w in widths.items()).rstrip()
        )


def main(argv: list[str] | None = None) -> None:
    Parser(__doc__).parse_args(argv)
    print_table(zoo_rows(), left=("model", "base", "cca"))
    print()
    print_table(tokenizer_rows(), left=("tokenizer", "weights", "models"))
    print("\n" + __doc__.split("\n\n")[2].strip())


if __name__ == "__main__":
    run_command(main)
