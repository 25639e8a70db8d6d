"""Evaluate samples against a reference as guided-diffusion does: FID, sFID, IS, precision, recall.

    python eval_fid.py --samples samples.npz --reference imagenet256 --output results.json
    python eval_fid.py --samples samples.npz --reference assets/fashion-mnist-test-10k.npz --features mini
    torchrun --nproc_per_node 8 eval_fid.py --samples samples.npz --reference reference.npz
    python eval_fid.py --compare base.json guided.json cca.json

Samples and reference are .npz files (arr_0 uint8 [N, H, W, 3]) or folders of images, which --resize brings
to one resolution. If a reference holds mu and sigma (mu_s, sigma_s), FID (sFID) uses these statistics, and
its arr_0 is used for precision, recall and KID. The names imagenet256 and imagenet512 stand for
guided-diffusion's references, which are downloaded at first use. The command prints a table, writes JSON,
and notes what makes a figure not comparable with published ones.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from cca.cli.main import play, run_command
from cca.cli.output import Output, OutputStatus
from cca.cli.parser import Parser, count
from cca.cli.plan import add_dry_run_option
from cca.data.image_folders import add_orientation_option, check_orientation_option, is_image_folder
from cca.data.image_sets import ImageSet, open_image_set, read_sampling_options
from cca.data.labels import add_classes_option, read_classes
from cca.distributed import Ranks
from cca.evaluation.comparability import comparability, compare, read_row
from cca.evaluation.evaluator import METRICS, Comparison, evaluate, extract, load_reference, timed
from cca.evaluation.features import Extractor, add_features_options, features_plan, make_extractor
from cca.evaluation.references import REFERENCES, find_reference, published_name
from models.utils.errors import UserError
from models.zoo.hub import Download


def make_parser() -> Parser:
    parser = Parser(__doc__, "eval_fid")
    add = parser.group("data").add_argument
    add(
        "--samples",
        type=Path,
        metavar="FILE.npz|FOLDER|ARCHIVE",
        help="images to evaluate (required unless --compare)",
    )
    add(
        "--reference",
        metavar=f"{'|'.join(REFERENCES)}|FILE.npz|FOLDER|ARCHIVE",
        help="reference that the samples are compared with: a published one by its name, or images or "
        "statistics of your own (required unless --compare)",
    )
    add(
        "--resize",
        type=count(),
        metavar="PIXELS",
        help="resolution to which images of folders are resized and centre-cropped, as in guided-diffusion, "
        "in pixels (default: no resizing)",
    )
    add_orientation_option(parser.group("data"))
    add_classes_option(parser.group("data"))

    add_features_options(parser)
    parser.group("method").add_argument(
        "--metrics",
        type=metric_names,
        help=f"metrics to compute, separated by commas: {', '.join(METRICS)} "
        "(default: all that the files allow)",
    )

    add = parser.group("output").add_argument
    add("--output", type=Path, metavar="FILE.json", help="file of results to write (default: none)")
    add(
        "--compare",
        type=Path,
        nargs="+",
        metavar="FILE.json",
        help="print the results in these files side by side, with the published figures, and exit",
    )
    add_dry_run_option(parser)
    return parser


def metric_names(text: str) -> tuple[str, ...]:
    """Return the metrics that --metrics names: its argparse type."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in names)


@dataclass
class Evaluation:
    """The job of an evaluation, resolved from the options. ``reference`` is None until it is downloaded."""

    args: argparse.Namespace
    ranks: Ranks
    status: OutputStatus
    samples: ImageSet
    reference: ImageSet | None
    downloads: list[Download]
    parts: None = None  # the output is one file

    def identity(self) -> dict:
        args = self.args
        return {
            "samples": len(self.samples),
            "metrics": args.metrics,
            "resize": args.resize,
            "exif_orientation": args.exif_orientation,
        }

    def plan(self) -> dict[str, str]:
        args = self.args
        return {
            "samples": f"{args.samples}, {len(self.samples):,} images",
            "reference": f"{args.reference}, {self.reference_text()}",
            "features": features_plan(args.features, args.inception_weights)[0],
            "metrics": ", ".join(args.metrics or ["all that the files allow"]),
            "device": f"{self.ranks.devices}, batch {args.batch_size}",
            "writes": str(args.output or "no file (--output writes the results)"),
        }

    def reference_text(self) -> str:
        """Return the plan's text on the reference: its images, and their size if the samples have another."""
        reference, own = self.reference, self.samples.size
        images = "to be downloaded" if reference is None else f"{len(reference):,} images"
        size = 2 * (self.args.published.resolution,) if reference is None else reference.size
        if size in (own, (0, 0)):
            return images
        return f"{images} ({size[1]} x {size[0]}; the samples are {own[1]} x {own[0]})"

    def prepare(self) -> dict:
        """Get the reference and the feature extractor; return the options that decide the figures."""
        args, ranks = self.args, self.ranks
        if self.reference is None:
            args.published.fetch()  # called on each rank: one downloads, the others wait
            self.reference = open_reference(args, ranks)
        self.extractor = make_extractor(args.features, args.inception_weights, ranks)
        options = {
            **self.identity(),
            "samples_sha256": ranks.digest(self.samples.fingerprint),
            "reference_sha256": ranks.digest(self.reference.fingerprint),
            "features": self.extractor.name,
            "features_sha256": self.extractor.weights_sha256,
            "classes": self.samples.classes,
        }
        return {"options": options}

    def work(self, content: dict) -> bool:
        """Evaluate; rank 0 prints the results and writes them. Raises UserError."""
        args, samples, reference, extractor = self.args, self.samples, self.reference, self.extractor
        assert reference is not None
        seconds: dict[str, float] = {}
        with timed(seconds, "reference"):  # first, since it may be refused
            reference_features = load_reference(reference, extractor, args.batch_size, self.ranks)
        with timed(seconds, "features of the samples"):
            sample_features = extract(samples, extractor, args.batch_size, self.ranks)
        if sample_features is None:  # rank 0 has the features of all images
            return True
        comparison = Comparison(sample_features, reference_features, samples.labels(), self.ranks.device)
        values, notes = evaluate(comparison, args.metrics, seconds)
        if not values:
            raise UserError(f"--metrics: none can be computed; {'; '.join(notes)}")
        report = {
            "command": self.ranks.command(args.command),
            **content,
            "metrics": values,
            **describe_files(samples, reference, extractor),
            "notes": notes + comparability(comparison, samples, reference, extractor),
            "seconds": seconds,
        }
        if args.output:
            output_of(args).describe(report)
        print_results(report)
        return True


def print_results(report: dict) -> None:
    """Print the metrics and the notes of an evaluation's results."""
    samples, reference = report["samples"], report["reference"]
    print(
        f"{Path(samples['file']).name}: {samples['count']:,} samples against "
        f"{Path(reference['file']).name}, features {report['features']['extractor']}"
    )
    for name in [name for name in METRICS if name in report["metrics"]]:
        print(f"  {name:<10} {report['metrics'][name]:10.{METRICS[name].digits + 1}f}")
    for note in report["notes"]:
        print(f"  note: {note}")


def resolve(args: argparse.Namespace, ranks: Ranks, status: OutputStatus) -> Evaluation:
    """Open the samples and the reference, and return the job. Raises UserError."""
    if status.is_finished:
        read_row(args.output, "--output")  # raises now if the figures that are printed later are damaged
    classes, upright = read_classes(args.classes_from), args.exif_orientation
    samples = open_image_set(args.samples, args.resize, args.workers, classes, upright)
    check_count(samples, ranks)
    labels = samples.labels()
    if labels is not None and labels.min() < 0:
        raise UserError(f"{args.samples}: arr_1 holds class {labels.min()}; classes start at 0")
    missing = args.published.downloads() if args.published else []
    reference = None if missing else open_reference(args, ranks)  # else after the download
    _, downloads = features_plan(args.features, args.inception_weights)
    return Evaluation(args, ranks, status, samples, reference, [*missing, *downloads])


def output_of(args: argparse.Namespace) -> Output:
    return Output.file(args.output, "results")


def check_options(args: argparse.Namespace, output: Output | None) -> None:
    """Check options that depend on each other, and replace the reference's name by its path.

    Sets ``args.published``, the published reference or None, and ``args.reference``, a path. Raises UserError
    for options that do not go together, and for an output that may not be written.
    """
    if missing := [option for option in ("samples", "reference") if getattr(args, option) is None]:
        raise UserError(f"--{missing[0]}: is required")
    args.published = find_reference(args.reference)
    args.reference = args.published.path if args.published else Path(args.reference)
    if args.resize and not any(is_image_folder(path) for path in (args.samples, args.reference)):
        raise UserError("--resize: applies to folders of images; --samples and --reference are none")
    check_orientation_option(args, args.samples, args.reference)
    if args.classes_from and not is_image_folder(args.samples):
        raise UserError(
            f"--classes-from: applies to a folder of samples; the classes of {args.samples} are in its arr_1"
        )
    if output is None:
        return
    output.check_place({"--samples": args.samples, "--reference": args.reference}, suffix=".json")


def check_count(images: ImageSet, ranks: Ranks) -> None:
    """Raise UserError if there are fewer than 5 images, or fewer than ranks."""
    if len(images) < (least := max(5, ranks.world_size)):
        raise UserError(f"{images.path}: holds {len(images)} images; at least {least} are needed")


def open_reference(args: argparse.Namespace, ranks: Ranks) -> ImageSet:
    """Open the reference, which may hold only statistics. Raises UserError."""
    images = open_image_set(args.reference, args.resize, args.workers, upright=args.exif_orientation)
    if not images.statistics and not len(images):
        raise UserError(f"--reference: {args.reference} holds neither images nor mu and sigma")
    if len(images):
        check_count(images, ranks)
    return images


def describe_files(samples: ImageSet, reference: ImageSet, extractor: Extractor) -> dict[str, dict]:
    """Return the entries of the results on samples, reference and features, with their hashes."""
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
            "published": published_name(reference.path),
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
        if other := [name for name in ("samples", "reference", "output") if getattr(args, name) is not None]:
            raise UserError(f"--{other[0]}: does not go with --compare, which only prints; leave it out")
        print(compare(args.compare))
        return
    output = output_of(args) if args.output else None
    check_options(args, output)
    job = play(args, output, resolve)
    if job and job.status.is_finished and job.ranks.is_main:
        print_results(job.status.content)


if __name__ == "__main__":
    run_command(main)
