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

import os
from pathlib import Path

from models.outputs import check_output

from cca.data.classes import add_classes_option, read_classes
from cca.data.image_sets import open_image_set
from cca.data.sampling_report import report_path
from cca.distributed import Processes
from cca.evaluation.comparability import comparability, compare
from cca.evaluation.evaluator import (
    METRICS,
    Comparison,
    Stopwatch,
    check_count,
    evaluate,
    extract,
    load_reference,
)
from cca.evaluation.features import FEATURE_BYTES, add_features_options, features_plan, make_extractor
from cca.evaluation.references import REFERENCE_IMAGES, REFERENCES, find_reference
from models import UserError
from models.errors import run_command
from models.files import write_json, writing
from models.options import Parser, count
from models.plan import add_dry_run_option, output_text, show_plan, size_text


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
    add("--metrics", help=f"comma-separated, of {', '.join(METRICS)} (default: all that the files give)")
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


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.compare:
        print(compare(args.compare))
        return
    for option in ("samples", "reference"):
        if getattr(args, option) is None:
            raise UserError(f"--{option}: is required")
    published = find_reference(args.reference)
    args.reference = published.path if published else Path(args.reference)
    metrics = tuple(args.metrics.split(",")) if args.metrics is not None else None
    unknown = [name for name in metrics or () if name not in METRICS]
    if unknown:
        raise UserError(f"--metrics: {unknown[0]!r} is not one of {', '.join(METRICS)}")
    if args.output and args.output.resolve() == report_path(args.samples).resolve():
        raise UserError(
            f"--output: {args.output} is where sample.py describes the samples; take another name"
        )
    if args.resize and not any(os.path.isdir(path) for path in (args.samples, args.reference)):
        raise UserError("--resize: cuts images of folders; those of an .npz are taken as they are")
    given = read_classes(args.classes_from)
    if given is not None and not os.path.isdir(args.samples):
        raise UserError(
            f"--classes-from: goes with a folder of samples; the labels of {args.samples} are arr_1"
        )
    if args.output:
        check_output("--output", args.output, {"--samples": args.samples, "--reference": args.reference})
    samples = open_image_set(args.samples, args.resize, args.workers, given)
    awaited = published.downloads() if published else []
    reference_images = None if awaited else open_image_set(args.reference, args.resize, args.workers)
    labels = samples.labels()
    if labels is not None and len(labels) != len(samples):
        raise UserError(f"{args.samples}: arr_0 has {len(samples)} images, arr_1 {len(labels)} labels")
    if labels is not None and len(labels) and labels.min() < 0:
        raise UserError(f"{args.samples}: arr_1 holds class {labels.min()}; classes start at 0")
    processes = Processes()
    check_count(samples, processes)
    if reference_images is not None and not reference_images.statistics() and not len(reference_images):
        raise UserError(f"--reference: {args.reference} holds neither images nor mu and sigma")
    if reference_images is not None and len(reference_images):  # else it holds statistics alone
        check_count(reference_images, processes)
    features, downloads = features_plan(args.features, args.inception_weights)
    downloads = [*awaited, *downloads]

    def show() -> None:
        images = REFERENCE_IMAGES if reference_images is None else len(reference_images)
        needed = (len(samples) + images) * FEATURE_BYTES
        held = f"{args.reference}, " + ("to be downloaded" if awaited else f"{images:,} images")
        if published and samples.size != (published.side, published.side):
            width, height = samples.size
            held += f" ({published.side} x {published.side}; the samples are {width} x {height})"
        rows = {
            "samples": f"{args.samples}, {len(samples):,} images",
            "reference": held,
            "features": features,
            "metrics": ", ".join(metrics) if metrics else "all that the files give",
            "device": f"{processes.devices}, batch {args.batch_size}",
            "memory": f"~{size_text(needed)} for the features",
            "writes": output_text(args.output) if args.output else "no file (--output writes the results)",
        }
        show_plan(rows, downloads)

    if not processes.planned(show, downloads, args.dry_run):
        return
    if reference_images is None:
        assert published
        published.fetch()  # in each process: one downloads, the others wait
        reference_images = open_image_set(args.reference, args.resize, args.workers)
    extractor = make_extractor(args.features, args.inception_weights, processes.device)
    stopwatch = Stopwatch()
    with stopwatch.measure("reference"):  # first, since it may have to be refused
        reference = load_reference(reference_images, extractor, args.batch_size, processes)
    with stopwatch.measure("features of the samples"):
        found = extract(samples, extractor, args.batch_size, processes)
    if found is None:  # the main process has the features of all
        return
    values, notes = evaluate(Comparison(found, reference, labels, processes.device), metrics, stopwatch)
    if not values:
        raise UserError(f"--metrics: nothing can be computed; {'; '.join(notes)}")
    notes += comparability(samples, labels, found, reference, extractor, reference_images)
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
            "command": processes.command(args.command),
            "metrics": values,
            "samples": {
                "file": str(args.samples),
                "count": len(samples),
                "sha256": samples.content_hash(),
                "classes": samples.classes(),
                "sampling": samples.sampling_report().get("options"),
            },
            "reference": {
                "file": str(args.reference),
                "count": len(reference_images),
                "sha256": reference_images.content_hash(),
            },
            "features": {
                "extractor": extractor.name,
                "layer": extractor.layer,
                "weights_sha256": extractor.weights_sha256,
            },
            "notes": notes,
            "seconds": stopwatch.parts,
        }
        with writing(args.output):
            args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, report)


if __name__ == "__main__":
    run_command(main)
