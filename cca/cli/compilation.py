"""Whether a run is compiled."""

import os
import shutil
import sys

from cca.distributed import Ranks
from models import UserError

# What torch.compile calls: on a CPU Inductor's C++, on a GPU Triton's C.
COMPILERS = {"cpu": ("CXX", "g++", "clang++"), "cuda": ("CC", "gcc", "clang", "cc")}


def decide_compile(asked: bool | None, default: bool, ranks: Ranks) -> bool:
    """Return whether to compile: as asked, else by default where this machine has a compiler.

    Raises UserError where it was asked for and there is none.
    """
    wanted = default if asked is None else asked
    variable, *names = COMPILERS[ranks.device.type]
    if not wanted or any(map(shutil.which, (os.environ.get(variable, names[0]), *names))):
        return wanted
    missing = f"there is no compiler ({', '.join(names)}), which torch.compile needs"
    if asked:
        raise UserError(f"--compile: {missing}; install one, or take --no-compile")
    if ranks.is_main:
        print(f"note: runs without --compile: {missing}", file=sys.stderr)
    return False
