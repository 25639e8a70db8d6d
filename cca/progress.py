"""The progress bar of every command."""

import sys
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 30  # between two lines in a log


class ProgressBar(tqdm):
    """tqdm's bar on a terminal; in a log, a line every ``LINE_SECONDS`` and one at the end."""

    def __init__(self, *args: Any, **options: Any):
        terminal = sys.stderr is not None and sys.stderr.isatty()
        interval = {} if terminal else {"mininterval": LINE_SECONDS, "maxinterval": 2 * LINE_SECONDS}
        super().__init__(*args, **options, **interval)

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """Return a function that shows the bar: over the last state on a terminal, else on a new line."""
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda text: print(text.strip(), file=file, flush=True) if text else None
