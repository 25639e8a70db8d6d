"""List the model zoo, and what of it is on this machine: ``python -m models``."""

from models.zoo import ZOO, ZooEntry, build_model


def zoo_rows() -> list[dict[str, str]]:
    """One row per model and image size, ready to print."""
    rows = []
    for name, entry in ZOO.items():
        for size in entry.base:
            model = build_model(name, size)
            rows.append({
                "model": name,
                "parameters": f"{sum(p.numel() for p in model.transformer.parameters()) / 1e6:,.0f} M",
                "pixels": str(size),
                "tokens": str(model.sequence_length),
                **published_columns(entry, size),
                "base": _where(entry.base[size]),
                "cca": _where(entry.cca.get(size)),
            })  # fmt: skip
    return rows


def published_columns(entry: ZooEntry, size: int) -> dict[str, str]:
    """Published FID-50k figures; they were taken at the model's default image size."""
    figures = entry.published if size == entry.default_image_size else None
    base, guided, cca = (getattr(figures, field, None) for field in ("base", "guided", "cca"))
    scale = f" (s={figures.cfg_scale:g})" if guided else ""
    show = lambda value: "–" if value is None else f"{value:.2f}"  # noqa: E731
    return {"FID base": show(base), "FID guided": show(guided) + scale, "FID CCA": show(cca)}


def _where(file) -> str:
    if file is None:
        return "–"
    if file.repository is None:
        return "bundled"
    return "cached" if file.cached() else "on the hub"


def main() -> None:
    rows = zoo_rows()
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]}
    for row in (dict(zip(widths, widths)), *rows):
        print("  ".join(row[c].ljust(w) if c in ("model", "base", "cca") else row[c].rjust(w) for c, w in widths.items()).rstrip())
    print("\nFID-50k on ImageNet as published: base and CCA without guidance, guided at scale s; LlamaGen at 384 pixels, resized to 256.")


if __name__ == "__main__":
    main()
