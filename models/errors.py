"""Users' mistakes: one line on stderr, exit status 2, no traceback."""

import os
import sys
import time
from collections.abc import Callable


class UserError(Exception):
    """What the user can put right; the message names the option, file or tensor at fault."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's ``main`` and turn a UserError into its one line."""
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # all make most mistakes; torchrun ends this one here if the main one said so
        # A data loader's worker process hands its error on with a traceback; the message is its last line.
        message = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
