"""Evaluate samples against a reference: FID, inception score, precision, recall, accuracy.

    python eval_fid.py --samples samples.npz --reference assets/fashion-mnist-test-10k.npz --features mini

Prints a table, writes JSON, and says what makes a figure not comparable with published ones.
"""

import json
import time
from pathlib import Path

from cca.errors import UserError, run_command
from cca.evaluator import LAYERS, METRICS, comparability, evaluate, image_set
from cca.options import Parser, count
from models.checkpoints import atomic_write, file_sha256


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--samples", required=True, type=Path, metavar="FILE.npz", help="arr_0 uint8 images [N, H, W(, 3)] and arr_1 classes [N]")
    add("--reference", required=True, type=Path, metavar="FILE.npz", help="reference images, same layout")
    add("--features", required=True, choices=sorted(LAYERS), help="feature extractor")
    add("--metrics", default=",".join(METRICS), help="comma-separated (default %(default)s)")
    add("--batch-size", type=count(), default=500, help="images per forward pass (default %(default)s)")
    add("--output", type=Path, metavar="FILE.json", help="also write the results there")
    args = parser.parse_args(argv)
    metrics = tuple(args.metrics.split(","))
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise UserError(f"--metrics: {unknown[0]!r} is not one of {', '.join(METRICS)}")
    began = time.perf_counter()
    samples, reference = (image_set(path, args.features, args.batch_size) for path in (args.samples, args.reference))
    values, notes = evaluate(samples, reference, metrics), comparability(samples, args.features)
    print(f"{args.samples.name}: {len(samples.labels):,} samples against {len(reference.labels):,} images of {args.reference.name}")
    for name, value in values.items():
        print(f"  {name:<10} {value:10.4f}")
    for note in notes:
        print(f"  note: {note}")
    if args.output:
        report = {
            "metrics": values,
            "samples": {"file": str(args.samples), "count": len(samples.labels), "sha256": file_sha256(args.samples)},
            "reference": {"file": str(args.reference), "count": len(reference.labels), "sha256": file_sha256(args.reference)},
            "features": args.features,
            "notes": notes,
            "seconds": time.perf_counter() - began,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(args.output, lambda temporary: temporary.write_text(json.dumps(report, indent=2) + "\n"))


if __name__ == "__main__":
    run_command(main)
