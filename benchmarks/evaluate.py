"""Peak memory and time by part of evaluating 50,000 images of 256 pixels in one .npz.

    python -m benchmarks.evaluate

The images are made up.
"""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from benchmarks.load_memory import memory
from models.errors import run_command
from models.options import Parser, count

CHILD = "from benchmarks.evaluate import measure; measure({!r}, {!r}, {!r})"


def make_images(path: Path, images: int, side: int, seed: int) -> None:
    """Noise of random brightness, written a block at a time."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 64, (64, side, side, 3), np.uint8)
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (images, side, side, 3)}
        )
        for start in range(0, images, 64):
            block = noise[: images - start] + generator.integers(
                0, 190, (min(64, images - start), 1, 1, 3), np.uint8
            )
            file.write(np.ascontiguousarray(block))


def measure(samples: str, reference: str, output: str) -> None:
    """Run in a fresh process."""
    import eval_fid

    before = memory("VmRSS")
    common = ["--samples", samples, "--reference", reference, "--features", "mini"]
    eval_fid.main([*common, "--metrics", "fid,is,precision,recall", "--output", output])
    print(json.dumps({"peak": memory("VmHWM") - before}))


def main() -> None:
    parser = Parser(__doc__, "benchmarks.evaluate")
    parser.add_argument("--images", type=count(100), default=50_000, help="samples (default 50000)")
    parser.add_argument("--side", type=count(), default=256, help="pixels (default 256)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples, reference, output = (
            Path(folder) / name for name in ("samples.npz", "reference.npz", "result.json")
        )
        make_images(samples, args.images, args.side, 0)
        make_images(reference, min(args.images, 10_000), args.side, 1)
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        child = CHILD.format(str(samples), str(reference), str(output))
        printed = subprocess.check_output(
            [sys.executable, "-c", child], text=True, env=environment, stderr=subprocess.DEVNULL
        )
        peak = json.loads(printed.splitlines()[-1])["peak"]
        seconds = json.loads(output.read_text())["seconds"]
        features = (args.images + min(args.images, 10_000)) * (96 + 10) * 4
        print(
            f"{args.images:,} images of {args.side} pixels ({samples.stat().st_size / 1e9:.1f} GB), "
            f"mini features ({features / 1e6:.0f} MB of them)"
        )
        print(f"peak memory above the imports: {peak / 1e9:.2f} GB\n\n| part | seconds |\n|---|---|")
        for name, value in seconds.items():
            print(f"| {name} | {value:.1f} |")


if __name__ == "__main__":
    run_command(main)
