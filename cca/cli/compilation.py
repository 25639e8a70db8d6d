"""The decision whether a command uses torch.compile."""

import os
import shutil
import sys

from cca.cli.output import OutputStatus
from cca.distributed import Ranks
from models import UserError

# The compiler that torch.compile calls: C++ for Inductor on a CPU, C for Triton on a GPU. The first string is
# the environment variable that names it, the others are the usual commands.
COMPILERS = {"cpu": ("CXX", "g++", "clang++"), "cuda": ("CC", "gcc", "clang", "cc")}


def decide_compile(option: bool | None, default: bool, status: OutputStatus, ranks: Ranks) -> bool:
    """Return whether to compile: the value of --compile, else that of the resumed run, else the default.

    Without a compiler on this machine the default becomes False, with a note on stderr.

    Raises:
        UserError: --compile or the resumed run asks for a compiler, and there is none.
    """
    option = status.options.get("compile") if option is None else option
    is_wanted = default if option is None else bool(option)
    variable, *names = COMPILERS[ranks.device.type]
    has_compiler = any(map(shutil.which, (os.environ.get(variable, names[0]), *names)))
    if not is_wanted or has_compiler or status.is_finished:  # a finished output needs no compiler
        return is_wanted
    problem = f"torch.compile needs a compiler ({' or '.join(names)}), and this machine has none"
    if option:
        other = "--no-compile" if "compile" not in status.options else "another --output with --no-compile"
        raise UserError(f"--compile: {problem}; install one, or use {other}")
    if ranks.is_main:
        print(f"note: --compile is off: {problem}", file=sys.stderr)
    return False
