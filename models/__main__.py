"""List the model zoo: sizes, published FIDs, and what is on this machine already.

    python -m models

FID-50k on ImageNet as published: base and CCA without guidance, guided at scale s; LlamaGen at
384 pixels, resized to 256. The last columns say where the weights are: "cached" files are in the
cache of huggingface_hub, those "on the hub" are downloaded when first used, "–" were not published.
"""

from models.errors import run_command
from models.hub import WeightsFile
from models.loading import build_model, model_names
from models.options import Parser
from models.plan import parameter_count
from models.tables import aligned_table
from models.zoo import TOKENIZERS, ZOO, ZooEntry


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
        users = model_names(entry.backbone)
        usual = [model for model in users if ZOO[model].tokenizer == name]
        rows.append({
            "tokenizer": name,
            "parameters": parameter_count(build_model(users[0], tokenizer=name).tokenizer),
            "codebook": str(entry.config.vocab_size),
            "pixels per token": " x ".join(2 * [str(entry.config.autoencoder.downsampling)]),
            "weights": where(entry.weights),
            "models": ", ".join(usual) or f"{entry.backbone.family}, with --tokenizer-weights {name}",
        })  # fmt: skip
    return rows


def published_columns(entry: ZooEntry, size: int) -> dict[str, str]:
    """Published FID-50k figures; they were taken at the model's default image size."""
    figures = entry.published if size == entry.default_image_size else None
    base, guided, cca = (getattr(figures, field, None) for field in ("base", "guided", "cca"))
    scale = f" (s={figures.cfg_scale:g})" if figures and guided else ""
    shown = ["–" if value is None else f"{value:.2f}" for value in (base, guided, cca)]
    return dict(zip(("FID base", "FID guided", "FID CCA"), (shown[0], shown[1] + scale, shown[2])))


def where(file: WeightsFile | None) -> str:
    if file is None:
        return "–"
    if file.repository is None:
        return "bundled"
    return "cached" if file.cached() else "on the hub"


def main(argv: list[str] | None = None) -> None:
    Parser(__doc__, "models.__main__").parse_args(argv)
    print(aligned_table(zoo_rows(), left=("model", "base", "cca")))
    print()
    print(aligned_table(tokenizer_rows(), left=("tokenizer", "weights", "models")))
    print("\n" + __doc__.split("\n\n")[2].strip())


if __name__ == "__main__":
    run_command(main)
