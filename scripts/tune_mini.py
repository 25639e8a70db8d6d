"""Compare settings of the bundled models on the tuning images, on which no network was trained or tested.

    python -m scripts.tune_mini --model llamagen-mini --sampling "" "--cfg-scale 1.5" "--cfg-scale 2"
    python -m scripts.tune_mini --model var-mini --train "--beta 0.05 --lr 1e-3" "--loss sft" --seeds 3

Every --train is a string of options of the training command ("": the base as it is), every --sampling one
of sample.py; all combinations are run with all seeds. What is done is skipped, so the same command goes
on after an interruption, and more settings may be added. Prints a table, and writes it to OUTPUT/MODEL.md.

The tuning images are training images 50,000 to 59,999 of Fashion-MNIST (Debian: dataset-fashion-mnist).
"""

import hashlib
import itertools
import shlex
from pathlib import Path

from cca.distributed import Processes
from models.errors import run_command
from models.files import atomic_write
from models.options import Parser, count
from scripts.experiments import BUNDLED_TRAIN, MINI
from scripts.pipeline import InProcess, Pipeline, Row, Run
from scripts.pretrain_mini import RAW, TUNING, read_raw, write_images
from scripts.report import figures_table, provenance


def named(options: str) -> str:
    """A file name for a string of options."""
    words = "".join(character if character.isalnum() or character in ".-" else "_" for character in options)
    return (
        f"{words.strip('_-')[:60]}-{hashlib.sha256(options.encode()).hexdigest()[:6]}" if options else "base"
    )


def rows_of(model: str, training: list[str], sampling: list[str]) -> list[Row]:
    rows = []
    for train, sample in itertools.product(training, sampling):
        weights = Run(named(train), tuple(shlex.split(train))) if train else "base"
        label = " | ".join(filter(None, (train or "base", sample)))
        name = named(train) + (f"+{named(sample)}" if sample else "")
        rows.append(Row(model, name, label.replace("|", "\\|"), weights, tuple(shlex.split(sample))))
    return rows


def tuning_reference(raw: Path, folder: Path) -> Path:
    """The tuning images as an .npz, made on first use."""
    path = folder / "fashion-mnist-tuning-10k.npz"
    if not path.exists():
        images, labels = read_raw(raw, "train")
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda temporary: write_images(temporary, images[TUNING], labels[TUNING]))
    return path


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, "scripts.tune_mini")
    add = parser.add_argument
    add("--model", required=True, choices=MINI, help="bundled model")
    add(
        "--train",
        nargs="+",
        default=[""],
        metavar="OPTIONS",
        help='options of training; "" is the base (default)',
    )
    add("--sampling", nargs="+", default=[""], metavar="OPTIONS", help='options of sample.py (default "")')
    add("--seeds", type=count(), default=1, help="so many seeds from 0, of training and sampling (default 1)")
    add("--num-samples", type=count(100), default=5000, help="images of each evaluation (default 5000)")
    add("--raw", type=Path, default=RAW, metavar="DIR", help="folder of the four files (default %(default)s)")
    add("--output", type=Path, default=Path("runs/tune"), metavar="DIR", help="default %(default)s")
    args = parser.parse_args(argv)
    processes = Processes()
    if processes.main:
        tuning_reference(args.raw, args.output)
    processes.barrier()
    rows, seeds = rows_of(args.model, args.train, args.sampling), []
    for seed in range(args.seeds):
        pipeline = Pipeline(
            folder=args.output / f"seed-{seed}", shared=args.output, launcher=InProcess(processes),
            data=BUNDLED_TRAIN, reference=str(tuning_reference(args.raw, args.output)), features="mini",
            num_samples=args.num_samples, seed=seed, batch_size=128,
        )  # fmt: skip
        pipeline.claim()
        seeds.append(pipeline.run(rows))
    if processes.main:
        head = provenance("python -m scripts.tune_mini", range(args.seeds))
        text = f"{head}\n\n{figures_table(rows, seeds)}\n"
        atomic_write(args.output / f"{args.model}.md", lambda temporary: temporary.write_text(text))
        print(f"\n{text}")


if __name__ == "__main__":
    run_command(main)
