"""The argument parser of all commands, types of options, and options that several commands share."""

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from typing import Any, NoReturn

from models.utils.errors import UserError
from models.utils.files import VERSION
from models.utils.limits import Limits
from models.utils.precision import MOST_LOADERS, default_loaders

# Groups of options in --help, in this order; a group without options is not shown.
GROUPS = ("model", "data", "method", "optimisation", "performance", "output")


def command_line(module: str, arguments: Sequence[str] = ()) -> str:
    """Return what a user types after ``python``, or after torchrun's options, to run a module.

    ``module`` is a name such as "sample" or "scripts.extract_codes".
    """
    name = f"-m {module.removesuffix('.__main__')}" if "." in module else f"{module}.py"
    return f"{name} {shlex.join(arguments)}".strip()


class Parser(argparse.ArgumentParser):
    """An argument parser with groups of options, one-line errors and no abbreviated options.

    ``module`` is the command's name in Python, such as "sample" or "scripts.extract_codes". The attribute
    ``command`` of the parsed options is the whole command line, to be pasted after ``python``.
    """

    def __init__(self, description: str, module: str):
        self.module = module
        super().__init__(
            f"python {command_line(module)}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"cca {VERSION}")
        self._groups = {title: self.add_argument_group(title) for title in GROUPS}

    def group(self, title: str) -> argparse._ArgumentGroup:
        """Return the group of options with this title, one of ``GROUPS``."""
        return self._groups[title]

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does, with two differences.

        ``--option=--`` is refused: argparse takes it for an empty list and does not check it.
        ``--option=~/...`` is expanded to the home folder: shells do not expand it.
        """
        args = [_expand_home(text) for text in (sys.argv[1:] if args is None else args)]
        for text in args:
            if text.startswith("--") and text.endswith("=--"):
                self.error(f"{text.removesuffix('=--')}: expected one argument")
        namespace, rest = super().parse_known_args(args, namespace)
        namespace.command = command_line(self.module, args)
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def _expand_home(text: str) -> str:
    option, equals, value = text.partition("=")
    return f"{option}={os.path.expanduser(value)}" if option.startswith("--") and equals else text


def number(low: float, high: float | None = None, kind: type = float, above: bool = False):
    """Return an argparse type that parses a number and checks it; see ``Limits`` for the arguments."""
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
    """Return an argparse type that parses an integer of at least ``low``."""
    return number(low, kind=int)


def limits_of(options: Any, name: str) -> dict[str, Any]:
    """Return the ``type`` or the ``choices`` of an option, as keyword arguments of add_argument.

    They follow from ``options.limits``, the limits of a dataclass's fields.
    """
    allowed = options.limits[name]
    return {"type": number(*astuple(allowed))} if isinstance(allowed, Limits) else {"choices": allowed}


def add_workers_option(parser: Parser) -> None:
    """Add --workers, for commands that read images. Results do not depend on its value."""
    parser.group("performance").add_argument(
        "--workers",
        type=count(0),
        default=default_loaders(),
        metavar="N",
        help="data-loading workers per rank; 0: the rank reads its images itself (default: on a GPU the "
        f"rank's share of the CPU cores, at most {MOST_LOADERS}; on a CPU 0)",
    )


def add_model_options(parser: Parser, models: Iterable[str], weights: str | None) -> None:
    """Add the options that choose a model and its weights.

    ``weights`` lists what --weights takes; None leaves the option out.
    """
    add = parser.group("model").add_argument
    add("--model", required=True, choices=sorted(models), help="model name; `python -m models` lists them")
    if weights:
        add(
            "--weights",
            default="base",
            metavar=weights,
            help="transformer weights: published ones by name, a file, a file on the hub, or a run, whose "
            "exported model or newest checkpoint is used; :ema takes its averaged weights (default: base)",
        )
    add(
        "--tokenizer-weights",
        metavar="PATH|NAME|hf://…",
        help="tokenizer weights; for LlamaGen also a name, vq_ds16_c2i or vq_ds8_c2i "
        "(default: the model's own)",
    )
    add(
        "--image-size",
        type=count(),
        metavar="PIXELS",
        help="image resolution of the model, in pixels; LlamaGen: 256, 384 or 512 (default: the model's own)",
    )
