"""Command-line pieces that several commands share."""

import argparse
import sys
from collections.abc import Iterable
from typing import NoReturn

from models.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and that takes no abbreviated options."""

    def __init__(self, description: str):
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        prog = f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
        super().__init__(
            prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def number(low: float, high: float = float("inf"), kind: type = float, above: bool = False):
    """An argparse type: a number from ``low`` (or above it) to ``high``."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'an integer' if kind is int else 'a number'}"
            ) from None
        if not (low < value if above else low <= value) or not value <= high:
            lower = f"above {low:g}" if above else f"at least {low:g}"
            raise argparse.ArgumentTypeError(
                f"{text} must be {lower}" + (f" and at most {high:g}" if high != float("inf") else "")
            )
        return value

    return parse


def count(low: int = 1):
    """An argparse type: an integer of at least ``low``."""
    return number(low, kind=int)


def add_model_options(parser: argparse.ArgumentParser, models: Iterable[str], weights: str | None) -> None:
    """Which model a command works with; ``weights`` lists what --weights takes, None leaves it out."""
    add = parser.add_argument
    add("--model", required=True, choices=sorted(models), help="one of `python -m models`")
    if weights:
        add("--weights", default="base", metavar=weights, help="transformer weights (default base)")
    names = "vq_ds16_c2i, vq_ds8_c2i for LlamaGen"
    add(
        "--tokenizer-weights",
        metavar="PATH|NAME",
        help=f"tokenizer weights, or {names} (default: the model's own)",
    )
    sizes = "LlamaGen: 256, 384 or 512 (default: the model's)"
    add("--image-size", type=count(), metavar="PIXELS", help=f"side the model works at; {sizes}")
