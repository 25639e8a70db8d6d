"""Evaluate samples against a reference as guided-diffusion does: FID, sFID, IS, precision, recall.

    python eval_fid.py --samples samples.npz --reference imagenet256 --output results.json
    python eval_fid.py --samples samples.npz --reference assets/fashion-mnist-test-10k.npz --features mini
    torchrun --nproc_per_node 8 eval_fid.py --samples samples.npz --reference reference.npz
    python eval_fid.py --compare base.json guided.json cca.json

Samples and reference are .npz files (arr_0 uint8 [N, H, W, 3]) or folders of images, which --resize cuts
to one size. A reference with mu and sigma (mu_s, sigma_s) is taken at its word, its arr_0 serves
precision, recall and KID; imagenet256 and imagenet512 are guided-diffusion's, downloaded when first used.
Prints a table, writes JSON, and says what makes a figure not comparable with published ones.
"""

import argparse
import os
from functools import partial
from pathlib import Path

from cca.cli.main import OnePart, play, run_command
from cca.cli.output import Found, Output
from cca.cli.parser import Parser, count
from cca.cli.plan import add_dry_run_option, output_text
from cca.data.image_sets import ImageSet, open_image_set, read_sampling_options, report_path
from cca.data.labels import add_classes_option, read_classes
from cca.distributed import Processes
from cca.evaluation.comparability import comparability, compare
from cca.evaluation.evaluator import METRICS, Comparison, evaluate, extract, load_reference, timed
from cca.evaluation.features import Extractor, add_features_options, features_plan
from cca.evaluation.references import REFERENCES, find_reference
from models.utils.errors import UserError
from models.utils.files import write_json


def make_parser() -> Parser:
    parser = Parser(__doc__, "eval_fid")
    add = parser.add_argument
    add("--samples", type=Path, metavar="FILE.npz|FOLDER", help="images to evaluate")
    add(
        "--reference",
        metavar=f"{'|'.join(REFERENCES)}|FILE.npz|FOLDER",
        help="what they are held against: a published reference, or one of your own",
    )
    add_features_options(parser)
    add(
        "--metrics",
        type=metric_names,
        help=f"comma-separated, of {', '.join(METRICS)} (default: all that the files give)",
    )
    add(
        "--resize",
        type=count(),
        metavar="PIXELS",
        help="resize images of folders and cut them to squares of this side, as guided-diffusion does it",
    )
    add_classes_option(parser)
    add("--output", type=Path, metavar="FILE.json", help="also write the results there")
    add(
        "--compare",
        type=Path,
        nargs="+",
        metavar="FILE.json",
        help="print earlier results side by side, with the published figures, and stop",
    )
    add_dry_run_option(parser)
    return parser


def metric_names(text: str) -> tuple[str, ...]:
    """The argparse type of --metrics."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(METRICS)}")
    return names


def resolve(args: argparse.Namespace, processes: Processes, found: Found) -> OnePart:
    """Open the samples and the reference, and plan their evaluation. Raises UserError."""
    samples = open_image_set(args.samples, args.resize, args.workers, read_classes(args.classes_from))
    check_count(samples, processes)
    labels = samples.labels()
    if labels is not None and labels.min() < 0:
        raise UserError(f"{args.samples}: arr_1 holds class {labels.min()}; classes start at 0")
    missing = args.published.downloads() if args.published else []
    reference = None if missing else open_reference(args, processes)  # else once it is downloaded
    features, downloads = features_plan(args.features, args.inception_weights)
    rows = {
        "samples": f"{args.samples}, {len(samples):,} images",
        "reference": f"{args.reference}, {reference_text(args, samples, reference)}",
        "features": features,
        "metrics": ", ".join(args.metrics or ["all that the files give"]),
        "device": f"{processes.devices}, batch {args.batch_size}",
        "writes": output_text(args.output) if args.output else "no file (--output writes the results)",
    }
    return OnePart(rows, partial(work, args, samples, reference, processes), [*missing, *downloads])


def check_options(args: argparse.Namespace, output: Output | None) -> None:
    """Find the reference: ``args.published`` if its name is given, its path in ``args.reference``.

    Raises UserError for options that do not go together, and for an output that may not be written.
    """
    if missing := [option for option in ("samples", "reference") if getattr(args, option) is None]:
        raise UserError(f"--{missing[0]}: is required")
    args.published = find_reference(args.reference)
    args.reference = args.published.path if args.published else Path(args.reference)
    if args.resize and not any(os.path.isdir(path) for path in (args.samples, args.reference)):
        raise UserError("--resize: cuts images of folders; those of an .npz are taken as they are")
    if args.classes_from and not os.path.isdir(args.samples):
        raise UserError(
            f"--classes-from: goes with a folder of samples; the labels of {args.samples} are arr_1"
        )
    if output is None:
        return
    output.check_place({"--samples": args.samples, "--reference": args.reference})
    # Beside a folder, any other JSON is not sample.py's; beside an .npz it would be taken for that later.
    described = not os.path.isdir(args.samples) or read_sampling_options(args.samples)
    if described and args.output.resolve() == report_path(args.samples).resolve():
        raise UserError(
            f"--output: {args.output} is where sample.py describes the samples; take another name"
        )


def check_count(images: ImageSet, processes: Processes) -> None:
    """Raise UserError for too few images to evaluate."""
    if len(images) < (least := max(5, processes.world)):
        raise UserError(f"{images.path}: holds {len(images)} images; at least {least} are needed")


def open_reference(args: argparse.Namespace, processes: Processes) -> ImageSet:
    """The reference, which may hold statistics alone. Raises UserError."""
    images = open_image_set(args.reference, args.resize, args.workers)
    if not images.statistics and not len(images):
        raise UserError(f"--reference: {args.reference} holds neither images nor mu and sigma")
    if len(images):
        check_count(images, processes)
    return images


def reference_text(args: argparse.Namespace, samples: ImageSet, reference: ImageSet | None) -> str:
    """What the plan says of the reference: its images, and their size where the samples have another."""
    held = "to be downloaded" if reference is None else f"{len(reference):,} images"
    size = 2 * (args.published.side,) if reference is None else reference.size
    if size in (samples.size, (0, 0)):
        return held
    own, other = (f"{width} x {height}" for height, width in (size, samples.size))
    return f"{held} ({own}; the samples are {other})"


def work(
    args: argparse.Namespace, samples: ImageSet, reference: ImageSet | None, processes: Processes
) -> None:
    """Evaluate; rank 0 prints the results and writes them to ``args.output``. Raises UserError."""
    if reference is None:
        args.published.fetch()  # on each rank: one downloads, the others wait
        reference = open_reference(args, processes)
    extractor = Extractor(args.features, args.inception_weights, processes.device)
    seconds: dict[str, float] = {}
    with timed(seconds, "reference"):  # first, since it may have to be refused
        known = load_reference(reference, extractor, args.batch_size, processes)
    with timed(seconds, "features of the samples"):
        found = extract(samples, extractor, args.batch_size, processes)
    if found is None:  # rank 0 has the features of all
        return
    compared = Comparison(found, known, samples.labels(), processes.device)
    values, notes = evaluate(compared, args.metrics, seconds)
    if not values:
        raise UserError(f"--metrics: nothing can be computed; {'; '.join(notes)}")
    notes += comparability(compared, samples, reference, extractor)
    print(
        f"{args.samples.name}: {len(samples):,} samples against {args.reference.name}, "
        f"features {extractor.name}"
    )
    for name, value in values.items():
        print(f"  {name:<10} {value:10.{METRICS[name].digits + 1}f}")
    for note in notes:
        print(f"  note: {note}")
    if args.output:
        report = {
            "format": 1,
            "command": processes.command(args.command),
            "metrics": values,
            **describe_files(samples, reference, extractor),
            "notes": notes,
            "seconds": seconds,
        }
        write_json(args.output, report)


def describe_files(samples: ImageSet, reference: ImageSet, extractor: Extractor) -> dict[str, dict]:
    """What the results say of the files that they were computed from."""
    return {
        "samples": {
            "file": str(samples.path),
            "count": len(samples),
            "sha256": samples.content_hash(),
            "classes": samples.classes,
            "sampling": read_sampling_options(samples.path) or None,
        },
        "reference": {
            "file": str(reference.path),
            "count": len(reference),
            "sha256": reference.content_hash(),
        },
        "features": {
            "extractor": extractor.name,
            "layer": extractor.layer,
            "weights_sha256": extractor.weights_sha256,
        },
    }


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.compare:
        print(compare(args.compare))
        return
    output = Output(args.output) if args.output else None
    check_options(args, output)
    play(args, output, resolve)


if __name__ == "__main__":
    run_command(main)
