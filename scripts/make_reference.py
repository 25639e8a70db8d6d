"""Make a reference .npz for eval_fid.py from images, in the layout of guided-diffusion's.

    python -m scripts.make_reference --images imagenet/train --image-size 256 --output imagenet256.npz

Writes mu, sigma (pooled features of all images), mu_s, sigma_s (spatial ones, for sFID) and arr_0:
some of the images, uint8 [n, H, W, 3], for precision and recall. torchrun shares the work.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from models.outputs import check_output
from tqdm import tqdm

from cca.data.image_sets import open_image_set, to_uint8_tensor
from cca.distributed import Processes
from cca.evaluation.features import add_features_options, features_plan, make_extractor
from cca.evaluation.metrics import Gaussian, RunningGaussian
from cca.evaluation.references import REFERENCE_IMAGES
from cca.streams import DATA_ORDER, stream
from models.errors import UserError, run_command
from models.files import write_binary, writing
from models.options import Parser, count
from models.plan import add_dry_run_option, output_text, show_plan


def total(running: RunningGaussian, processes: Processes) -> Gaussian:
    """The Gaussian of all processes' features together."""
    fit = running.fit()
    count = running.count
    # Sums about zero add up over processes; float64 leaves 16 digits for features of order one.
    second = fit.sigma * (count - 1) + count * np.outer(fit.mu, fit.mu)
    sums = [
        processes.sum(torch.from_numpy(np.asarray(x, np.float64)).to(processes.device)).cpu().numpy()
        for x in (count, count * fit.mu, second)
    ]
    mean = sums[1] / sums[0]
    return Gaussian(mean, (sums[2] - sums[0] * np.outer(mean, mean)) / (sums[0] - 1))


def make_parser() -> Parser:
    parser = Parser(__doc__, "scripts.make_reference")
    add = parser.add_argument
    add("--images", required=True, type=Path, metavar="FILE.npz|FOLDER", help="the images")
    add(
        "--image-size",
        type=count(),
        help="cut images of a folder to squares of this side (default: they are squares already)",
    )
    add_features_options(parser)
    add(
        "--kept-images",
        type=count(),
        default=REFERENCE_IMAGES,
        help="images in arr_0, drawn at random (default %(default)s)",
    )
    add("--seed", type=count(0), default=0, help="seed of the draw (default 0)")
    add("--output", required=True, type=Path, metavar="FILE.npz", help="file to write")
    add_dry_run_option(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.output.suffix != ".npz":
        raise UserError(f"--output: {args.output} does not end in .npz")
    if args.image_size and not os.path.isdir(args.images):
        raise UserError("--image-size: cuts images of a folder; those of an .npz are taken as they are")
    check_output("--output", args.output, {"--images": args.images})
    images = open_image_set(args.images, args.image_size, args.workers)
    processes = Processes()
    if len(images) < 2 * processes.world:
        raise UserError(
            f"--images: {args.images} holds {len(images)} images; at least {2 * processes.world} are needed"
        )
    features, downloads = features_plan(args.features, args.inception_weights)

    def show() -> None:
        rows = {
            "images": f"{args.images}, {len(images):,} images",
            "features": features,
            "device": f"{processes.devices}, batch {args.batch_size}",
            "writes": f"{output_text(args.output)}, "
            f"with {min(args.kept_images, len(images)):,} of the images",
        }
        show_plan(rows, downloads)

    if not processes.planned(show, downloads, args.dry_run):
        return
    extractor = make_extractor(args.features, args.inception_weights, processes.device)
    processes.same({"images": processes.digest(images.fingerprint), "features": extractor.weights_sha256})
    chosen = set(stream(args.seed, DATA_ORDER).permutation(len(images))[: args.kept_images].tolist())
    share = processes.share(len(images))
    kept, pooled, spatial, index = [], RunningGaussian(), RunningGaussian(), share.start
    with tqdm(
        total=share.stop - share.start, desc="features", unit="image", disable=not processes.main
    ) as bar:
        for batch in images.batches(share, args.batch_size):
            found = extractor(to_uint8_tensor(batch))
            pooled.add(found.pooled.numpy())
            if found.spatial is not None:
                spatial.add(found.spatial.numpy())
            kept += [image for i, image in enumerate(batch, index) if i in chosen]
            index += len(batch)
            bar.update(len(batch))
    arrays = dict(zip(("mu", "sigma"), vars(total(pooled, processes)).values()))
    if spatial.count:
        arrays |= dict(zip(("mu_s", "sigma_s"), vars(total(spatial, processes)).values()))
    pixels = torch.from_numpy(np.stack(kept)) if kept else torch.empty(0, *images.size, 3, dtype=torch.uint8)
    gathered = processes.gather(pixels)
    if processes.main:
        for note in images.notes():
            print(f"note: {note}", file=sys.stderr)
        with writing(args.output):
            args.output.parent.mkdir(parents=True, exist_ok=True)
        write_binary(args.output, lambda file: np.savez(file, arr_0=gathered.numpy(), **arrays))
        print(f"{args.output}: statistics of {len(images):,} images, {len(gathered):,} of them kept")


if __name__ == "__main__":
    run_command(main)
