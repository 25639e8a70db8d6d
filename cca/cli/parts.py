"""A large array that several ranks compute and store in parts, which are then joined in one file."""

import math
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from cca.distributed import Ranks, StopRequest
from cca.progress import ProgressBar
from models.utils.errors import UserError
from models.utils.files import atomic_write, read_array, write_binary

HEADER_BYTES = 128  # np.save pads the header of a part's file to this

# Function from ranges of rows to these rows, in order, in pieces of any length (also empty).
MakeRows = Callable[[list[range]], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Parts:
    """The parts of an array of ``shape`` [N, ...] and ``dtype``: files of ``rows_per_part`` rows each."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    rows_per_part: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def part(self, start: int) -> range:
        """Return the range of rows of the part that begins at row ``start``."""
        return range(start, min(start + self.rows_per_part, self.shape[0]))

    def all(self) -> Iterator[range]:
        return map(self.part, range(0, self.shape[0], self.rows_per_part))

    def path(self, part: range) -> Path:
        return self.folder / f"{part.start:08d}.npy"

    def is_stored(self, part: range) -> bool:
        """Return whether the file of a part exists and has its full size."""
        try:
            size = self.path(part).stat().st_size
        except OSError:
            return False
        return size == HEADER_BYTES + len(part) * self.row_bytes

    def missing(self) -> list[range]:
        return [part for part in self.all() if not self.is_stored(part)]

    def rows_stored(self) -> int:
        starts = [int(path.stem) for path in self.folder.glob("*.npy") if path.stem.isdecimal()]
        return sum(len(self.part(start)) for start in starts if self.is_stored(self.part(start)))

    def space_needed(self) -> int:
        """Return how many bytes must still be written: the missing parts, then the joined file."""
        return (2 * self.shape[0] - self.rows_stored()) * self.row_bytes

    def write(self, part: range, rows: np.ndarray) -> None:
        write_binary(self.path(part), lambda file: np.save(file, rows.astype(self.dtype, copy=False)))

    def _read(self, part: range) -> np.ndarray:
        try:
            rows = read_array(self.path(part))
        except UserError:
            rows = np.empty(0)
        if rows.shape != (len(part), *self.shape[1:]) or rows.dtype != self.dtype:
            raise UserError(f"--output: {self.path(part)} is damaged; remove it and repeat the command")
        return rows

    def copy_to(self, file: IO[bytes]) -> None:
        """Write the array as .npy, with one part in memory at a time. Raise UserError for a damaged part."""
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in self.all():
            file.write(np.ascontiguousarray(self._read(part)).data)


def store(parts: Parts, own: list[range], pieces: Iterator[np.ndarray]) -> Generator[int, None, None]:
    """Store the parts ``own`` from pieces of rows; yield the number of rows of each piece, also 0.

    A thread writes a part while the next one is computed, so two parts are in memory. A part is written
    before its last piece is yielded, so a caller that stops loses no whole part.
    """
    being_written: Future[None] | None = None
    rows_so_far = list[np.ndarray]()
    with ThreadPoolExecutor(1) as writer:
        for part in own:
            new_rows = 0
            while sum(map(len, rows_so_far)) < len(part):
                yield new_rows
                rows_so_far.append(next(pieces))
                new_rows = len(rows_so_far[-1])
            if being_written:
                being_written.result()
            rows = np.concatenate(rows_so_far)
            being_written = writer.submit(parts.write, part, rows[: len(part)])
            rows_so_far = [rows[len(part) :].copy()]  # the last piece may reach into the next part
            yield new_rows
        if being_written:
            being_written.result()


def run_steps(ranks: Ranks, steps: Iterator[int], bar: ProgressBar, stop: StopRequest) -> bool:
    """Run the steps of all ranks, and show their numbers of rows; return whether a signal stopped all ranks.

    An error on one rank ends all ranks.
    """
    is_done = False

    def advance() -> None:
        nonlocal is_done
        rows = None if is_done else next(steps, None)
        is_done = rows is None
        if rows:
            bar.set_postfix_str("", refresh=False)
            bar.update(rows)

    # Signals reach the ranks at different times, and one rank may have one part more than another.
    while ranks.any_rank(not is_done) and not ranks.any_rank(stop.is_requested):
        ranks.run_or_abort_all(advance)
    return ranks.any_rank(stop.is_requested)


def make_in_parts(
    ranks: Ranks,
    parts: Parts,
    make: MakeRows,
    finish: Callable[[], None],
    description: str,
    first_text: str = "",
) -> bool:
    """Compute and store the missing parts, distributed over the ranks; then rank 0 joins them.

    An error on one rank ends all ranks.

    Args:
        make: function that computes the rows of the given ranges.
        finish: function that writes the output from the parts.
        description: label of the progress bar.
        first_text: text that the bar shows until the first rows are ready.

    Returns:
        False if a signal stopped all ranks (the same command resumes).
    """
    # Rank 0 lists the parts before any rank writes: other nodes may see new files only later.
    missing = ranks.broadcast_from_rank0(lambda: [part.start for part in parts.missing()])
    own = [parts.part(start) for start in missing[ranks.share(len(missing))]]
    steps, total = store(parts, own, make(own)), sum(map(len, own))
    with (
        closing(steps),  # waits until the last part is written
        StopRequest() as stop,
        ProgressBar(total=total, desc=description, unit="image", disable=not ranks.is_main) as bar,
    ):
        if first_text:
            bar.set_postfix_str(first_text)
        is_stopped = run_steps(ranks, steps, bar, stop)
    ranks.barrier()
    if is_stopped and ranks.is_main:
        print(
            f"stopped; {parts.rows_stored()} of {parts.shape[0]} images are stored, "
            "repeat the command to resume"
        )
    elif ranks.is_main:  # the others do not wait: a collective would time out after half an hour
        finish()
    return not is_stopped


def write_npy(path: Path, parts: Parts) -> None:
    """Join the parts into one .npy. Raise UserError if that fails."""
    write_binary(path, parts.copy_to)


def write_npz(path: Path, parts: Parts, labels: Iterable[np.ndarray] | None) -> None:
    """Join the parts into the .npz that guided-diffusion's evaluator reads. Raise UserError if that fails.

    labels: classes int64 [n], in pieces, in the order of the rows; None omits arr_1.
    """

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            # Entries have no date, so that equal samples give equal files.
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                parts.copy_to(file)
            if labels is not None:
                with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as file:
                    header = {"descr": "<i8", "fortran_order": False, "shape": parts.shape[:1]}
                    np.lib.format.write_array_header_1_0(file, header)
                    for piece in labels:
                        file.write(piece.astype("<i8").tobytes())

    atomic_write(path, write)
