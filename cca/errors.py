"""Users' mistakes: one line on stderr, exit status 2, no traceback."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """What the user can put right; the message names the option, file or tensor at fault."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's ``main`` and turn a UserError into its one line."""
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # all processes make the same mistake; one says so
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
