"""Convert weights from the published PyTorch format to .safetensors, or back, tensor for tensor.

    python -m scripts.convert_weights var_d16.pth var_d16.safetensors
    python -m scripts.convert_weights var_d16.safetensors var_d16.pth

The state dict keeps its keys, shapes, dtypes and buffers. Other content of LlamaGen's files (options, step
counters) is left out. A .pth or .pt is written in the published layout: a bare state dict for VAR, one under
"model" for LlamaGen. Training checkpoints (nested, or with the prefixes of DDP and torch.compile) are
converted to this layout too.
"""

import argparse
from functools import partial
from pathlib import Path

from torch import Tensor

from cca.cli.main import OnePart, play, run_command
from cca.cli.output import Output, OutputStatus
from cca.cli.parser import Parser
from cca.cli.plan import add_dry_run_option
from cca.distributed import Ranks
from models.utils.errors import UserError
from models.utils.files import size_text
from models.zoo.checkpoint_formats import read_weights, save_published, save_safetensors
from models.zoo.loading import published_key

SUFFIXES = (".pth", ".pt", ".safetensors")


def make_parser() -> Parser:
    parser = Parser(__doc__, "scripts.convert_weights")
    parser.group("model").add_argument(
        "input",
        type=Path,
        help="weights file or checkpoint (RUN/state/step-N, with :ema the average) to read; the content "
        "decides the format, not the suffix",
    )
    parser.group("output").add_argument(
        "output", type=Path, help="file to write; the suffix (.pth, .pt or .safetensors) decides the format"
    )
    add_dry_run_option(parser)
    return parser


def resolve(args: argparse.Namespace, ranks: Ranks, status: OutputStatus) -> OnePart:
    """Read the weights, and return the job that writes them. Raises UserError."""
    state, key = read_weights(args.input)
    size = size_text(sum(tensor.nbytes for tensor in state.values()))
    rows = {"reads": f"{args.input} ({len(state)} tensors, {size})", "writes": str(args.output)}
    return OnePart(ranks, rows, partial(work, args, state, published_key(state) if key is None else key))


def work(args: argparse.Namespace, state: dict[str, Tensor], key: str) -> None:
    """Write the state dict under ``key``, or bare if that is empty. Raises UserError."""
    save = save_safetensors if args.output.suffix == ".safetensors" else save_published
    save(state, args.output, key)
    print(f"written to {args.output}")


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.output.suffix not in SUFFIXES:
        raise UserError(f"output: {args.output} ends in none of {', '.join(SUFFIXES)}")
    output = Output(args.output, noun="weights", last=args.output, option="output")
    output.check_place({"input": args.input})
    play(args, output, resolve)


if __name__ == "__main__":
    run_command(main)
