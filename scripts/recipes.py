"""The experiments as data: the samples that the quickstart and each table and figure of the paper need.

The paper is arXiv 2410.09347, and the numbers of tables and figures are those of the paper. Each function
``*_rows`` takes the name of a model and the options of scripts/reproduce.py, and returns the rows of a report
in order.
"""

import shlex
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cca.losses import LOSSES
from models import ZOO, UserError


@dataclass(frozen=True)
class Run:
    """A fine-tuning run; ``options`` are options of the training command."""

    name: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A set of samples and its figures.

    weights: "base", "cca" (the published weights), or the run that trains them.
    sampling: options of sample.py.
    published: FID-50k in the paper for these settings, or None.
    series: the lines of a plot (``report.SERIES``) on which the row is a point, each with the value that
        varies along the line.
    """

    model: str
    name: str
    label: str
    weights: str | Run = "base"
    sampling: tuple[str, ...] = ()
    published: float | None = None
    series: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        """The name of the row's files, without suffix."""
        return f"{self.model}-{self.name}"


@dataclass(frozen=True)
class Sweep:
    """The values in a sweep: guidance scales, lambdas at the recipe's beta, and betas at ``beta_lambda``.

    beta_lambda: None is the recipe's lambda. usual: a good guidance scale.
    """

    scales: tuple[float, ...]
    lambdas: tuple[float, ...]
    betas: tuple[float, ...]
    beta_lambda: float | None = None
    usual: float = 2.0


# Figure 4 varies guidance from 0 to 3, and lambda from 1 to 10,000 at beta 0.02. Figure 9 varies beta at
# lambda 1,000, and lambda from 0.
PUBLISHED = Sweep(
    scales=(1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0),
    lambdas=(0, 1, 10, 100, 300, 1000, 10_000),
    betas=(2, 0.5, 0.1, 0.02, 0.005),
    beta_lambda=1000,
)
SMALLER = {
    "llamagen-mini": Sweep(scales=(1.25, 1.5, 2.0, 2.5, 3.0), lambdas=(1, 100, 1000), betas=(1, 0.05)),
    "var-mini": Sweep(scales=(1.5, 2.0, 3.0, 4.0, 5.0), lambdas=(1, 100, 1000), betas=(0.5, 0.02), usual=3.0),
}
LOSS_LABELS = {"cca": "CCA", "dpo": "DPO", "unlearning": "unlearning", "sft": "control: maximum likelihood"}
CCA, CONTROL = Run("cca"), Run("sft", ("--loss", "sft"))


def sweep(model: str) -> Sweep:
    return SMALLER.get(model, PUBLISHED)


def sampling_options(model: str, guidance: float | None = None) -> tuple[str, ...]:
    """Return options of sample.py: the published settings, if there are some, and the guidance scale."""
    preset = ("--preset", "published") if ZOO[model].published else ()
    return preset if guidance is None else (*preset, "--cfg-scale", f"{guidance:g}")


def published_fid(model: str, what: str) -> float | None:
    published = ZOO[model].published
    return published and published.fid(what)


def base_rows(model: str) -> list[Row]:
    """Return the rows of the base without guidance; for VAR one with its sampler's filters and one without.

    The paper does not say which of these two its figures are for, so neither row has a published FID.
    """
    settings, guidance = ZOO[model].published, {"guidance": 1.0}
    if settings is None or not settings.has_filters:
        fid = published_fid(model, "base")
        return [Row(model, "base", "base, no guidance", "base", sampling_options(model), fid, guidance)]
    filters = f"top-k {settings.top_k}, top-p {settings.top_p:g}"
    without = (*sampling_options(model), "--top-k", "0", "--top-p", "1")
    return [
        Row(model, "base-no-filters", "base, no guidance, no filters", "base", without, None, {"free": 1.0}),
        Row(model, "base", f"base, no guidance, {filters}", "base", sampling_options(model), None, guidance),
    ]


def guided_row(model: str, scale: float) -> Row:
    return Row(
        model, f"base-cfg{scale:g}", f"base, guidance {scale:g}",
        sampling=sampling_options(model, scale), series={"guidance": scale},
    )  # fmt: skip


def guided_rows(model: str) -> list[Row]:
    """Return the rows of the base, one per guidance scale."""
    return [guided_row(model, scale) for scale in sweep(model).scales]


def trained_row(model: str, run: Run, label: str, **other) -> Row:
    """Return the row of a run that this project trains, sampled without guidance."""
    return Row(model, run.name, label, run, sampling_options(model), **other)


def quickstart_rows(model: str, options: Namespace) -> list[Row]:
    """Return the rows of the quickstart: base, CCA, base per guidance scale; with --control the controls."""
    rows = [*base_rows(model), trained_row(model, CCA, "CCA, no guidance", series={"recipe": 1.0})]
    if not options.control:
        return [*rows, *guided_rows(model)]
    label = "control: maximum likelihood, no guidance"
    control = trained_row(model, CONTROL, label, series={"control": 1.0})
    cooler = (*sampling_options(model), "--temperature", "0.8")
    cooler_row = Row(model, "base-t0.8", "control: base at temperature 0.8", sampling=cooler)
    return [*rows, control, *guided_rows(model), cooler_row]


def table_rows(model: str, options: Namespace) -> list[Row]:
    """Return the rows of tables 1 and 2 and figure 1: base and CCA without guidance, base with guidance."""
    cca, published = published_fid(model, "cca"), ZOO[model].published
    own = trained_row(model, CCA, "CCA trained here, no guidance", published=cca)
    if published is None:
        return [*base_rows(model), guided_row(model, sweep(model).usual), own]
    guided = Row(
        model, "base-guided", f"base, guidance {published.cfg_scale:g}",
        sampling=("--preset", "published-cfg"), published=published.fid("guided"),
    )  # fmt: skip
    released = Row(
        model, "cca-released", "CCA as published, no guidance", "cca", sampling_options(model), cca
    )
    return [*base_rows(model), guided, released, *([] if options.from_released else [own])]


def ablation_rows(model: str, options: Namespace) -> list[Row]:
    """Return the rows of table 3: the losses side by side, and plain maximum likelihood.

    A loss without published settings for the model is left out, except if --loss-options has some.
    """
    rows, loss_options = base_rows(model), dict(options.loss_options)
    for loss in LOSSES:
        if loss in loss_options or loss in ZOO[model].recipes:
            run = Run(loss, ("--loss", loss, *shlex.split(loss_options.get(loss, ""))))
            label, fid = f"{LOSS_LABELS.get(loss, loss)}, no guidance", published_fid(model, loss)
            rows.append(trained_row(model, run, label, published=fid))
    return rows


def left_out(model: str, rows: list[Row]) -> str:
    """Return a sentence on the losses that are missing among the rows of an ablation; "" if none is."""
    missing = [loss for loss in LOSSES if loss not in {row.name for row in rows}]
    if not missing:
        return ""
    values = " ".join(f"--{name.rstrip('_')} 0.02" for name in LOSSES[missing[0]].hyperparameters)
    return (
        f"Left out: {', '.join(missing)}. Their beta, lambda and learning rate are not published for "
        f"{model}; set them with --loss-options, for example --loss-options {missing[0]} "
        f"'{values} --lr 1e-6'."
    )


def tradeoff_rows(model: str, options: Namespace) -> list[Row]:
    """Return the rows of figures 4 and 9: CCA over lambda and over beta, and the base over guidance scales.

    A pair of beta and lambda that lies on both lines, or is the recipe's, is trained once.
    """
    recipe, values = ZOO[model].recipes["cca"], sweep(model)
    at_lambda = values.beta_lambda or recipe.lambda_
    betas = {*values.betas, recipe.beta} if at_lambda == recipe.lambda_ else {*values.betas}
    points: dict[tuple[float, float], dict[str, float]] = {(recipe.beta, recipe.lambda_): {"recipe": 1.0}}
    for value in sorted({*values.lambdas, recipe.lambda_}):
        points.setdefault((recipe.beta, value), {})["lambda"] = value
    for value in sorted(betas):
        points.setdefault((value, at_lambda), {})["beta"] = value
    rows = [*base_rows(model), *guided_rows(model)]
    for (beta, lambda_), series in points.items():
        options = ("--beta", f"{beta:g}", "--lambda", f"{lambda_:g}")
        run = CCA if "recipe" in series else Run(f"cca-beta{beta:g}-lambda{lambda_:g}", options)
        label = "CCA, the recipe" if run is CCA else f"CCA, beta {beta:g}, lambda {lambda_:g}"
        rows.append(trained_row(model, run, label, series=series))
    return [*rows, trained_row(model, CONTROL, "control: maximum likelihood", series={"control": 1.0})]


def with_guidance_rows(model: str, options: Namespace) -> list[Row]:
    """Return the rows of figure 6: CCA, trained by its recipe for this, with guidance on top."""
    if "with-guidance" not in ZOO[model].recipes:
        raise UserError(f"--models: {model} has no recipe for CCA with guidance on top")
    run = Run("with-guidance", ("--recipe", "with-guidance"))
    rows = [trained_row(model, run, "CCA, no guidance", series={"on top": 1.0})]
    rows += [
        Row(
            model, f"with-guidance-cfg{scale:g}", f"CCA, guidance {scale:g}", run,
            sampling_options(model, scale), series={"on top": scale},
        )
        for scale in sweep(model).scales
    ]  # fmt: skip
    return [*base_rows(model), *guided_rows(model), *rows]


SHEET = (6, 4)  # columns and lines of images in figures 7 and 8


def same_noise_rows(model: str, options: Namespace) -> list[Row]:
    """Return the rows of figures 7 and 8: one class, sampled in three ways with the same random numbers."""
    published = ZOO[model].published
    guidance = options.guidance
    if guidance is None:
        guidance = published.cfg_scale if published else sweep(model).usual
    weights = (
        "cca" if ZOO[model].cca and options.base == "base" else CCA
    )  # published CCA weights belong to the published base
    fixed = ("--classes", str(options.label), "--num-samples", str(SHEET[0] * SHEET[1]))
    ways = (("base", "base, no guidance", "base", None), ("cca", "CCA, no guidance", weights, None),
            (f"cfg{guidance:g}", f"base, guidance {guidance:g}", "base", guidance))  # fmt: skip
    return [
        Row(model, f"class{options.label}-{name}", title, source, (*sampling_options(model, scale), *fixed))
        for name, title, source, scale in ways
    ]


@dataclass(frozen=True)
class Experiment:
    """The rows of a model, and the default models: published ones, and bundled ones for --mini."""

    rows: Callable[[str, Namespace], list[Row]]
    models: tuple[str, ...]
    mini: tuple[str, ...] = ("llamagen-mini", "var-mini")


VAR_TABLE = ("var-d16", "var-d20", "var-d24", "var-d30")
LLAMAGEN_TABLE = ("llamagen-b", "llamagen-l", "llamagen-xl", "llamagen-xxl", "llamagen-3b")
ABLATED = ("llamagen-l", "var-d24")  # the models of table 3
EXPERIMENTS = {
    "quickstart": Experiment(quickstart_rows, ()),
    "tables": Experiment(table_rows, (*VAR_TABLE, *LLAMAGEN_TABLE)),
    "var-tables": Experiment(table_rows, VAR_TABLE, ("var-mini",)),
    "llamagen-tables": Experiment(table_rows, LLAMAGEN_TABLE, ("llamagen-mini",)),
    "tradeoff": Experiment(tradeoff_rows, ABLATED),
    "ablation": Experiment(ablation_rows, ABLATED),
    "with-guidance": Experiment(with_guidance_rows, LLAMAGEN_TABLE),
    "samples": Experiment(same_noise_rows, ABLATED),
}
