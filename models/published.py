"""Published figures of every model, and the sampling settings behind them; no other file states them.

Sources: CCA's model zoo and the tables of its paper (arXiv 2410.09347); figures with guidance are of
the bases' own model zoos, VAR (arXiv 2404.02905) and LlamaGen (arXiv 2406.06525).
"""

from collections.abc import Mapping
from dataclasses import dataclass

Figures = Mapping[str, float]  # by metric, named as eval_fid.py does


@dataclass(frozen=True)
class Published:
    """Figures of 50,000 samples on ImageNet 256, and the sampling settings behind them.

    figures: by what was sampled: "base", "guided" (the base at ``cfg_scale``), "cca", and the paper's
        baselines "dpo" and "unlearning"; all but "guided" without guidance. What was not published
        is not there.
    cfg_scale: guidance in the notation of --cfg-scale.
    notes: where a source has other figures, or does not state a setting.
    with_guidance: address of a folder with the weights of CCA for guidance on top.
    """

    figures: Mapping[str, Figures]
    cfg_scale: float
    notes: tuple[str, ...] = ()
    with_guidance: str | None = None
    top_k: int = 0
    top_p: float = 1.0
    class_order: str = "random"
    dtype: str = "bfloat16"
    eval_size: int | None = 256

    def fid(self, sampled: str) -> float | None:
        return self.figures.get(sampled, {}).get("fid")


def _figures(
    fid: float,
    inception: float | None = None,
    sfid: float | None = None,
    precision: float | None = None,
    recall: float | None = None,
) -> Figures:
    every = {"fid": fid, "sfid": sfid, "is": inception, "precision": precision, "recall": recall}
    return {name: value for name, value in every.items() if value is not None}


def _var(*notes: str, **figures: Figures) -> Published:
    unstated = ("the filters that the base was sampled with, without guidance, are not stated",)
    return Published(
        figures,
        2.5,
        (*notes, *(unstated if "base" in figures else ())),
        top_k=900,
        top_p=0.96,
        class_order="balanced",
        dtype="float16",
    )


def _llamagen(cfg_scale: float, *notes: str, **figures: Figures) -> Published:
    folder = "https://huggingface.co/ChenDRAG/CCA_LlamaGen/tree/main/CCA_LlamaGen_w_CFG"
    return Published(figures, cfg_scale, notes, folder)


PUBLISHED: dict[str, Published] = {
    "var-d16": _var(guided=_figures(3.55), cca=_figures(4.03)),
    "var-d20": _var(guided=_figures(2.95), cca=_figures(3.02)),
    "var-d24": _var(
        base=_figures(6.20, 154.3, 8.50, 0.74, 0.62),
        guided=_figures(2.33),
        cca=_figures(2.63, 298.8, 7.63, 0.84, 0.55),
        dpo=_figures(7.53, 232.6, 19.10, 0.85, 0.34),
        unlearning=_figures(5.55, 165.9, 8.41, 0.75, 0.61),
    ),
    "var-d30": _var(
        "CCA's paper gives the guided base FID 1.92 and IS 323.1",
        base=_figures(5.25, 175.6, None, 0.75, 0.62),
        guided=_figures(1.97),
        cca=_figures(2.54, 264.2, None, 0.83, 0.56),
    ),
    "llamagen-b": _llamagen(2.0, guided=_figures(6.09), cca=_figures(7.04)),
    "llamagen-l": _llamagen(
        2.0,
        "the abstract page of CCA's paper gives FID 19.07 and IS 64.3 to the base, FID 3.41 to CCA",
        base=_figures(19.00, 64.7, 8.78, 0.61, 0.67),
        guided=_figures(3.07),
        cca=_figures(3.43, 288.2, 7.44, 0.81, 0.52),
        dpo=_figures(61.69, 30.8, 44.98, 0.36, 0.40),
        unlearning=_figures(12.22, 111.6, 7.99, 0.66, 0.64),
    ),
    "llamagen-xl": _llamagen(1.75, guided=_figures(2.62), cca=_figures(3.10)),
    "llamagen-xxl": _llamagen(1.75, guided=_figures(2.34), cca=_figures(3.12)),
    "llamagen-3b": _llamagen(
        1.65,
        base=_figures(9.38, 112.9, None, 0.69, 0.67),
        guided=_figures(2.18, 263.3),
        cca=_figures(2.69, 276.8, None, 0.80, 0.59),
    ),
}
