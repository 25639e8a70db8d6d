"""Command-line pieces that several commands share."""

import argparse
import sys
from typing import NoReturn

from cca.errors import UserError


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
