"""Compare what CCA has learned with the direction in which guidance moves.

    python -m scripts.learned_direction runs/quickstart/llamagen-mini-cca runs/quickstart/var-mini-cca

For each image x, under its own class c and under another class, the script computes two values in nats:

    learned(x, c)  = log p_theta(x|c) - log p_ref(x|c), with p_theta of the run and p_ref of the base,
    guidance(x, c) = log p_ref(x|c) - log p_ref(x|null class)

Guidance raises log p(x|c) in proportion to guidance(x, c). The optimum of CCA's loss is proportional to
log p(x|c)/p(x), which guidance(x, c) estimates (arXiv 2410.09347). The slope of the least-squares line says
how many nats the run learned for one nat of guidance. Several runs of one model count as several seeds.
"""

from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.table import provenance
from cca.cli.main import OnePart, play, run_command
from cca.cli.output import Output, OutputStatus
from cca.cli.parser import Parser, count
from cca.cli.plan import add_dry_run_option
from cca.cli.tables import markdown_table
from cca.data.image_sets import NpzImages, to_uint8_tensor
from cca.data.labels import check_labels
from cca.distributed import Ranks
from cca.training.encoding import to_tokens
from models import ARImageModel, UserError, find_files, load_model
from models.utils.files import atomic_write
from models.zoo.run_folders import run_config
from scripts.report import save_figure, spread

BATCH = 100  # images per forward pass
CPU = torch.device("cpu")


def make_parser() -> Parser:
    parser = Parser(__doc__, "scripts.learned_direction")
    parser.group("model").add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folders of finished CCA runs of bundled models"
    )
    add = parser.group("data").add_argument
    add(
        "--images",
        type=Path,
        default=Path("assets/fashion-mnist-test-10k.npz"),
        metavar="FILE.npz",
        help="labelled images that no network was trained on (default: %(default)s)",
    )
    add(
        "--num-images",
        type=count(2),
        default=1500,
        help="number of first images to use (default: %(default)s)",
    )
    parser.group("output").add_argument(
        "--output",
        type=Path,
        default=Path("runs/learned-direction.md"),
        metavar="FILE.md",
        help="file of tables to write; FILE.png beside it is the picture (default: %(default)s)",
    )
    add_dry_run_option(parser)
    return parser


@dataclass
class Comparison:
    """What one run learned, compared with guidance.

    learned, guidance: nats per token [2 N, L], for N images under their own class, then under another one.
    parts: the slice of tokens of each VAR level, or of each row of LlamaGen's grid.
    """

    learned: np.ndarray
    guidance: np.ndarray
    parts: list[slice]

    def fit(self, tokens: slice = slice(None)) -> tuple[float, float]:
        """Return the correlation and the slope of learned over guidance, each summed over ``tokens``."""
        x, y = self.guidance[:, tokens].sum(1), self.learned[:, tokens].sum(1)
        return float(np.corrcoef(x, y)[0, 1]), float(np.polyfit(x, y, 1)[0])

    def mean(self, own_class: bool) -> float:
        """Return the mean of learned over images with their own class, or with another one, in nats."""
        matched, mismatched = np.split(self.learned.sum(1), 2)
        return float((matched if own_class else mismatched).mean())


def options_of_run(run: Path) -> dict:
    """Return the options of a training run. Raises UserError if the folder holds no such run."""
    options = run_config(run / "config.json").get("options", {})
    if not {"model", "weights", "weights_sha256"} <= options.keys():
        raise UserError(f"RUN: {run}: holds no config.json of a training run")
    return options


@torch.no_grad()
def token_logprobs(model: ARImageModel, labels: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probabilities [B, L] of tokens [B, L] under labels [B], in nats, float32."""
    return model.logits(labels, tokens).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def compare(run: Path, images: Tensor, labels: Tensor) -> Comparison:
    """Return the comparison of one run on uint8 images [N, 3, H, W] of classes [N]. Raises UserError."""
    options = options_of_run(run)
    name, weights = options["model"], options["weights"]
    files = find_files(name, str(run))
    of_base = (name, weights, files.config.get("tokenizer"), files.image_size)
    if find_files(*of_base).provenance()["weights_sha256"] != options["weights_sha256"]:
        raise UserError(f"RUN: {run}: its base, {weights}, has changed since training; restore that file")
    tuned, base = load_model(name, str(run)), load_model(*of_base)
    # The other classes in turn, so that no image is paired with its own class.
    others = (labels + 1 + torch.arange(len(labels)) % (base.num_classes - 1)) % base.num_classes
    learned, guidance = [], []
    for classes in (labels, others):
        for pixels, own in zip(images.split(BATCH), classes.split(BATCH)):
            tokens = to_tokens(base, pixels, CPU)
            reference = token_logprobs(base, own, tokens)
            learned.append(token_logprobs(tuned, own, tokens) - reference)
            guidance.append(reference - token_logprobs(base, torch.full_like(own, base.null_class), tokens))
    sizes = base.step_sizes
    if len(sizes) == base.sequence_length:  # one token per step: the parts are rows of the grid
        sizes = (round(len(sizes) ** 0.5),) * round(len(sizes) ** 0.5)
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for end, size in zip(ends.tolist(), sizes)]
    return Comparison(torch.cat(learned).double().numpy(), torch.cat(guidance).double().numpy(), parts)


def tables(comparisons: dict[str, list[Comparison]]) -> list[str]:
    """Return Markdown: a table of all models, then for each model its slopes by part."""
    rows = [
        [
            model,
            *(spread([run.fit()[i] for run in runs], ".2f") for i in (0, 1)),
            *(spread([run.mean(own) for run in runs], "+.2f") for own in (True, False)),
        ]
        for model, runs in comparisons.items()
    ]
    columns = ["model", "correlation", "slope", "learned, own class (nats)", "learned, another class (nats)"]
    sections = [markdown_table(columns, rows)]
    for model, runs in comparisons.items():
        parts = range(len(runs[0].parts))
        slopes = [spread([run.fit(run.parts[i])[1] for run in runs], ".2f") for i in parts]
        sections.append(f"{model}: slope by level, coarsest first, or by row of the grid, from the top.")
        sections.append(markdown_table([str(i + 1) for i in parts], [slopes]))
    return sections


def plot(path: Path, comparisons: dict[str, list[Comparison]]) -> None:
    """Plot one panel per model: learned over guidance for each pair of its first run, and the fitted line."""
    figure = Figure(figsize=(5.6 * len(comparisons), 4.8))
    axes = figure.subplots(1, len(comparisons), squeeze=False)
    for axis, (model, (first, *_)) in zip(axes[0], comparisons.items()):
        x, y = first.guidance.sum(1), first.learned.sum(1)
        for half, label in (
            (slice(len(x) // 2, None), "another class"),
            (slice(0, len(x) // 2), "its own class"),
        ):
            axis.plot(x[half], y[half], ".", markersize=3, alpha=0.4, label=f"image under {label}")
        slope, offset = np.polyfit(x, y, 1)
        ends = np.array([x.min(), x.max()])
        axis.plot(ends, slope * ends + offset, color="black", linewidth=1, label=f"slope {slope:.2f}")
        axis.axhline(0, color="gray", linewidth=0.8, zorder=0)
        axis.set(
            title=f"{model}: correlation {first.fit()[0]:.2f}",
            xlabel="guidance: log p_ref(x|c) − log p_ref(x|∅), nats",
            ylabel="learned: log p_θ(x|c) − log p_ref(x|c), nats",
        )
        axis.legend(fontsize=8, markerscale=3)
    save_figure(figure, path)


def resolve(args: Namespace, ranks: Ranks, status: OutputStatus) -> OnePart:
    """Return the job. Raises UserError for folders that are no runs, and for images that do not fit them."""
    images = NpzImages(args.images)
    labels = images.labels()
    if labels is None:
        raise UserError(f"--images: {args.images}: holds no labels (arr_1)")
    for run in args.runs:
        model = find_files(options_of_run(run)["model"], str(run)).build()
        check_labels(labels, model.num_classes, args.images)
        if images.size != (model.image_size, model.image_size):
            height, width = images.size
            raise UserError(
                f"--images: {args.images}: images have {height} x {width} pixels; "
                f"{run} needs {model.image_size} x {model.image_size}"
            )
    args.num_images = min(args.num_images, len(images))
    rows = {
        "runs": ", ".join(map(str, args.runs)),
        "images": f"{args.num_images:,} of {args.images}",
        "writes": f"{args.output}, {args.output.with_suffix('.png')}",
    }
    return OnePart(ranks, rows, partial(write, args, images))


def write(args: Namespace, images: NpzImages) -> None:
    """Compare all runs, and write the tables and the picture."""
    (pixels,) = images.batches(slice(0, args.num_images), args.num_images)
    labels = torch.from_numpy(images.labels()[: args.num_images])
    comparisons: dict[str, list[Comparison]] = {}
    for run in args.runs:
        comparison = compare(run, to_uint8_tensor(pixels), labels)
        comparisons.setdefault(options_of_run(run)["model"], []).append(comparison)
    picture = args.output.with_suffix(".png")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    plot(picture, comparisons)
    intro = f"{provenance(args.command)}. {len(pixels):,} images of {args.images.name}; mean ± standard"
    sections = [
        "# What CCA has learned",
        f"{intro} deviation over the runs of a model.",
        *tables(comparisons),
    ]
    image = f"![learned over guidance, the first run of each model]({picture.name})"
    text = "\n\n".join([*sections, image]) + "\n"
    atomic_write(args.output, lambda temporary: temporary.write_text(text))
    print(f"{text}\nwritten to {args.output} and {picture}")


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    Output(args.output).check_place(suffix=".md")
    play(args, None, resolve)


if __name__ == "__main__":
    run_command(main)
