"""Command-line pieces that several commands share."""

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from typing import Any, NoReturn

from models.utils.errors import UserError
from models.utils.limits import Limits
from models.utils.precision import MOST_LOADERS, default_loaders


def command_line(module: str, arguments: Sequence[str] = ()) -> str:
    """What is typed after ``python`` or torchrun's own options for "sample", or "scripts.extract_codes"."""
    name = f"-m {module.removesuffix('.__main__')}" if "." in module else f"{module}.py"
    return f"{name} {shlex.join(arguments)}".strip()


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and that takes no abbreviated options.

    ``module`` is the command's name in Python, such as "sample" or "scripts.extract_codes". The parsed
    options have the whole command as ``command``, ready to be pasted after ``python``.
    """

    def __init__(self, description: str, module: str):
        self.module = module
        super().__init__(
            f"python {command_line(module)}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, but for ``--option=--``, which it takes as an empty list, unchecked, and for
        ``--option=~/...``, in which a shell does not expand the home folder."""
        args = [_with_home(text) for text in (sys.argv[1:] if args is None else args)]
        for text in args:
            if text.startswith("--") and text.endswith("=--"):
                self.error(f"{text.removesuffix('=--')}: expected one argument")
        namespace, rest = super().parse_known_args(args, namespace)
        namespace.command = command_line(self.module, args)
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def _with_home(text: str) -> str:
    option, equals, value = text.partition("=")
    return f"{option}={os.path.expanduser(value)}" if option.startswith("--") and equals else text


def number(low: float, high: float | None = None, kind: type = float, above: bool = False):
    """Return an argparse type: a number within ``Limits`` of these arguments."""
    limits = Limits(low, high, kind, above)

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'an integer' if kind is int else 'a number'}"
            ) from None
        if problem := limits.problem(value):
            raise argparse.ArgumentTypeError(f"{text} {problem}")
        return value

    return parse


def count(low: int = 1):
    """An argparse type: an integer of at least ``low``; see ``number``."""
    return number(low, kind=int)


def limits_of(options: Any, name: str) -> dict[str, Any]:
    """Return argparse's ``type`` or ``choices`` for a field of a dataclass that has ``limits``."""
    allowed = options.limits[name]
    return {"type": number(*astuple(allowed))} if isinstance(allowed, Limits) else {"choices": allowed}


def add_workers_option(parser: argparse.ArgumentParser) -> None:
    """--workers, of every command that reads images: the same numbers whatever it is."""
    parser.add_argument(
        "--workers",
        type=count(0),
        default=default_loaders(),
        metavar="N",
        help="processes that read images ahead, of each process "
        f"(default: on a GPU its share of the cores, {MOST_LOADERS} at most; 0, none, on a CPU)",
    )


def add_model_options(parser: argparse.ArgumentParser, models: Iterable[str], weights: str | None) -> None:
    """Which model a command works with; ``weights`` lists what --weights takes, None leaves it out."""
    add = parser.add_argument
    add("--model", required=True, choices=sorted(models), help="one of `python -m models`")
    if weights:
        add("--weights", default="base", metavar=weights, help="transformer weights (default base)")
    names = "vq_ds16_c2i, vq_ds8_c2i for LlamaGen"
    add(
        "--tokenizer-weights",
        metavar="PATH|NAME|hf://…",
        help=f"tokenizer weights, or {names} (default: the model's own)",
    )
    sizes = "LlamaGen: 256, 384 or 512 (default: the model's)"
    add("--image-size", type=count(), metavar="PIXELS", help=f"side the model works at; {sizes}")
