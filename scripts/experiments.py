"""The paper's tables and figures (arXiv 2410.09347), as rows of samples to be made and measured.

``*_rows`` give what an experiment needs of one model; numbers in the names are the paper's own. The
bundled models have the same experiments at small scale, with the sweeps that ``Sweeps`` states.
"""

from dataclasses import dataclass

from models import ZOO, UserError
from models.llamagen import LlamaGen
from models.var import VAR
from scripts.pipeline import Row, Run


@dataclass(frozen=True)
class Sweeps:
    """What is varied: guidance (as in --cfg-scale), lambda at the recipe's beta, beta at ``beta_lambda``."""

    scales: tuple[float, ...]
    lambdas: tuple[float, ...]
    betas: tuple[float, ...]
    beta_lambda: float | None = None
    usual: float = 2.0  # a good guidance scale


# Figure 4: guidance from 0 to 3, lambda from 1 to 10,000 at beta 0.02; figure 9: beta at lambda 1,000.
PUBLISHED = Sweeps(
    scales=(1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0),
    lambdas=(1, 10, 100, 300, 1000, 10_000),
    betas=(2, 0.5, 0.1, 0.02, 0.005),
    beta_lambda=1000,
)
MINI = {
    "llamagen-mini": Sweeps(scales=(1.25, 1.5, 2.0, 2.5, 3.0), lambdas=(1, 100, 1000), betas=(1, 0.05)),
    "var-mini": Sweeps(
        scales=(1.5, 2.0, 3.0, 4.0, 5.0), lambdas=(1, 100, 1000), betas=(0.5, 0.02), usual=3.0
    ),
}
# The models of the paper's table 3, and what it calls them.
ABLATED = {LlamaGen: ("llamagen-l", "LlamaGen-L"), VAR: ("var-d24", "VAR-d24")}
LOSS_LABELS = {"cca": "CCA", "dpo": "DPO", "unlearning": "unlearning", "sft": "control: maximum likelihood"}
BUNDLED_TRAIN, BUNDLED_REFERENCE = "assets/fashion-mnist-train-10k.npz", "assets/fashion-mnist-test-10k.npz"
CONTROL = Run("sft", ("--loss", "sft"))
CCA = Run("cca")


def is_mini(model: str) -> bool:
    return model in MINI


def sweeps(model: str) -> Sweeps:
    return MINI.get(model, PUBLISHED)


def sampled(model: str, guidance: float | None = None) -> tuple[str, ...]:
    """Options of sample.py: the published settings at full size, guided at that scale."""
    preset = () if is_mini(model) else ("--preset", "published")
    return preset if guidance is None else (*preset, "--cfg-scale", f"{guidance:g}")


def published_fid(model: str, what: str) -> float | None:
    published = ZOO[model].published
    return published and published.fid(what)


def paper_order(model: str) -> str:
    """The losses by the FID of the paper's table 3, on its model of this backbone."""
    ablated, title = ABLATED[ZOO[model].backbone]
    labels = {"base": "base", **LOSS_LABELS}
    found = [(fid, labels[what]) for what in labels if (fid := published_fid(ablated, what)) is not None]
    return f"The paper's, {title}: {' < '.join(f'{label} ({fid:.2f})' for fid, label in sorted(found))}."


def base_row(model: str) -> Row:
    published = published_fid(model, "base")
    return Row(model, "base", "base, no guidance", sampling=sampled(model), published=published)


def guided_rows(model: str) -> list[Row]:
    """The base over its guidance scales."""
    return [
        Row(model, f"base-cfg{s:g}", f"base, guidance {s:g}", sampling=sampled(model, s))
        for s in sweeps(model).scales
    ]


def trained_row(model: str, run: Run, label: str, **other) -> Row:
    return Row(model, run.name, label, run, sampled(model), **other)


def ablation_rows(model: str, options: dict[str, tuple[str, ...]]) -> list[Row]:
    """Table 3: the losses side by side, and plain maximum likelihood.

    options: more options of a loss's run. A loss without a recipe and without options is left out.
    """
    rows = [base_row(model)]
    for loss, label in LOSS_LABELS.items():
        if loss not in options and loss not in ZOO[model].recipes:
            continue  # nobody has published its settings
        run = Run(loss, ("--loss", loss, *options.get(loss, ())))
        rows.append(trained_row(model, run, f"{label}, no guidance", published=published_fid(model, loss)))
    return rows


def lambda_rows(model: str) -> list[Row]:
    """CCA at the recipe's beta, lambda varied: figure 4, and the right half of figure 9."""
    return [
        trained_row(model, Run(f"cca-lambda{value:g}", ("--lambda", f"{value:g}")), f"CCA, lambda {value:g}")
        for value in sweeps(model).lambdas
    ]


def beta_rows(model: str) -> list[Row]:
    """CCA with beta varied: the left half of figure 9."""
    fixed = sweeps(model).beta_lambda
    more = () if fixed is None else ("--lambda", f"{fixed:g}")
    return [
        trained_row(model, Run(f"cca-beta{value:g}", ("--beta", f"{value:g}", *more)), f"CCA, beta {value:g}")
        for value in sweeps(model).betas
    ]


def with_guidance_rows(model: str) -> list[Row]:
    """Figures 5 and 6: CCA by the recipe for it, with guidance on top."""
    if "with-guidance" not in ZOO[model].recipes:
        raise UserError(f"--models: {model} has no recipe for CCA with guidance on top")
    run = Run("with-guidance", ("--recipe", "with-guidance"))
    rows = [trained_row(model, run, "CCA, no guidance")]
    for s in sweeps(model).scales:
        rows.append(Row(model, f"with-guidance-cfg{s:g}", f"CCA, guidance {s:g}", run, sampled(model, s)))
    return rows


def table_rows(model: str, from_released: bool) -> list[Row]:
    """Tables 1 and 2, and figure 1: base and CCA without guidance, the base with it."""
    published = ZOO[model].published
    if published is None:
        if not is_mini(model):
            raise UserError(f"--models: {model} has no row in the paper's tables")
        scale = MINI[model].usual
        guided = Row(model, f"base-cfg{scale:g}", f"base, guidance {scale:g}", sampling=sampled(model, scale))
        return [base_row(model), guided, trained_row(model, CCA, "CCA trained here, no guidance")]
    cca = published.fid("cca")
    rows = [
        base_row(model),
        Row(
            model, "base-guided", f"base, guidance {published.cfg_scale:g}",
            sampling=("--preset", "published-cfg"), published=published.fid("guided"),
        ),
        Row(model, "cca-released", "CCA as published, no guidance", "cca", sampled(model), cca),
    ]  # fmt: skip
    own = trained_row(model, CCA, "CCA trained here, no guidance", published=cca)
    return rows if from_released else [*rows, own]


def same_noise_rows(model: str, label: int, images: int, weights: str | Run, guidance: float) -> list[Row]:
    """Figures 7 and 8: one class from the same random numbers, three ways."""
    fixed = ("--classes", str(label), "--num-samples", str(images))
    ways = (("base", "base, no guidance", "base", None), ("cca", "CCA, no guidance", weights, None),
            ("guided", f"base, guidance {guidance:g}", "base", guidance))  # fmt: skip
    return [
        Row(model, f"class{label}-{name}", title, source, (*sampled(model, scale), *fixed))
        for name, title, source, scale in ways
    ]
