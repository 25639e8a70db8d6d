"""The progress bar that all commands use."""

import sys
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 30  # between two lines when standard error is not a terminal


class ProgressBar(tqdm):
    """tqdm's bar on a terminal; elsewhere one line every ``LINE_SECONDS`` and one at the end."""

    def __init__(self, *args: Any, **options: Any):
        if sys.stderr is not None and not sys.stderr.isatty():
            options |= {"mininterval": LINE_SECONDS, "maxinterval": 2 * LINE_SECONDS}
            options |= {"file": _Lines(sys.stderr), "leave": True}
        super().__init__(*args, **options)


class _Lines:
    """A text file that prints each state of the bar on a line of its own, without cursor movements."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, text: str) -> None:
        if line := text.strip():
            self.file.write(f"{line}\n")

    def flush(self) -> None:
        self.file.flush()
