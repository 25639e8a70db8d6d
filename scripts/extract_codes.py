"""Encode labelled images with a model's tokenizer, once, into packed codes for training.

    python -m scripts.extract_codes --model llamagen-mini --data assets/fashion-mnist-train-10k.npz --output runs/codes

Writes DIR/codes.npy uint16 [N, crops, L], DIR/labels.npy int64 [N] and DIR/header.json.
"""

import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cca.data import ImageTokens
from cca.errors import run_command
from cca.options import Parser, count
from models.checkpoints import atomic_write, file_sha256
from models.zoo import ZOO, load_files, locate


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, choices=sorted(ZOO), help="whose tokenizer encodes")
    parser.add_argument("--tokenizer-weights", metavar="PATH", help="tokenizer weights (default: the model's own)")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE.npz", help="arr_0 uint8 images [N, H, W(, 3)] and arr_1 labels [N]")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the codes")
    parser.add_argument("--batch-size", type=count(), default=128, help="images encoded at once (default %(default)s)")
    args = parser.parse_args(argv)
    files = locate(args.model, tokenizer_weights=args.tokenizer_weights)
    model = load_files(files)
    source = ImageTokens(args.data, model)
    size = len(source.labels)
    codes = np.empty((size, 1, model.sequence_length), np.uint16)
    for start in tqdm(range(0, size, args.batch_size), desc="encoding"):
        indices = np.arange(start, min(start + args.batch_size, size))
        codes[indices, 0] = source.tokens(indices, 0).numpy()
    header = {
        "model": args.model,
        "image_size": model.image_size,
        "vocab_size": model.vocab_size,
        "tokenizer_sha256": file_sha256(files.tokenizer_weights),
        "images": size,
        "crops": 1,
    }
    args.output.mkdir(parents=True, exist_ok=True)

    def write_array(name: str, array: np.ndarray) -> None:
        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:  # a file object: np.save would add a suffix to the name
                np.save(file, array)

        atomic_write(args.output / name, write)

    write_array("codes.npy", codes)
    write_array("labels.npy", source.labels.numpy())
    # Written last: a folder with a header is complete.
    atomic_write(args.output / "header.json", lambda temporary: temporary.write_text(json.dumps(header, indent=2) + "\n"))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_command(main)
