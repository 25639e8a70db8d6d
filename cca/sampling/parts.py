"""Parts of a sample file as they are made, over any number of processes; then one .npz.

Finished parts are stored as they come, so an interrupted run goes on where it stopped.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from models import UserError
from models.files import (
    atomic_write,
    parse_json,
    read_array,
    read_json,
    remove_folder,
    write_binary,
    write_json,
    writing,
)
from models.outputs import check_space, differing

PART_IMAGES = 256  # images per stored part
HEADER_BYTES = 128  # of a part's file: np.save pads to this
NOT_COMPARED = ("weights",)  # how the path was spelled; the hash of the weights counts
BEFORE = {"compile": False}  # what earlier versions did without noting it


class PartStore:
    """Finished ranges beside the output file, and the options they were made with.

    The folder's ``options.json`` marks it as an unfinished run: written before the first part, and
    gone, with the whole folder, after the output and its description are there.
    """

    def __init__(self, output: Path, options: dict, shape: tuple[int, ...]):
        """shape: of all images, [N, H, W, 3]."""
        self.folder, self.report = output.with_name(output.name + ".parts"), output.with_suffix(".json")
        self.output, self.options, self.shape = output, options, shape
        self.marker = self.folder / "options.json"

    def noted(self) -> dict | None:
        """The options of the unfinished run, or else of the samples, that lie there; None: there are none."""
        found = read_json(self.marker) if self.marker.exists() else None
        if found is None and self.output.exists():
            found = _read_report(self.report)
        return None if found is None else {**BEFORE, **found}

    def look(self) -> tuple[bool, int]:
        """Whether the output is finished already, and how many images are stored; writes nothing.

        Raises UserError where the output or its parts are of a run with other options, would overwrite
        what sample.py did not write, or do not fit on the disk.
        """
        unfinished = self.marker.exists()
        if unfinished:
            self._refuse_others(
                read_json(self.marker), self.folder, "an unfinished run", "repeat its command"
            )
        elif self.folder.exists():
            foreign = [p.name for p in self.folder.iterdir() if p.suffix not in (".npy", ".tmp")]
            if foreign:
                raise UserError(f"--output: {self.folder} is in the way, it holds {foreign[0]}; move it")
        if self._finished(unfinished):
            return True, self.shape[0]
        made = self.stored() if unfinished else 0
        needed = (2 * self.shape[0] - made) * int(np.prod(self.shape[1:]))
        check_space("--output", self.output, needed, "its parts, then the file")
        return False, made

    def open(self) -> bool:
        """Claim the folder for these options (in one process); whether the output is finished already.

        Raises UserError as ``look`` does, and then leaves everything as it is.
        """
        finished, _ = self.look()
        if finished:
            remove_folder(self.folder)
            return True
        if not self.marker.exists():
            remove_folder(self.folder)  # parts without a marker belong to nobody knows which options
            with writing(self.folder):
                self.folder.mkdir()
            write_json(self.marker, self.options)
        with writing(self.report):
            self.report.unlink(missing_ok=True)  # it describes an output that is gone
        return False

    def _finished(self, unfinished: bool) -> bool:
        """Whether output and description are there for these options; raises UserError for any others."""
        described = _read_report(self.report)
        if self.report.exists() and described is None:
            raise UserError(
                f"--output: {self.report}, where the samples are described, is a file that sample.py "
                "did not write; take another name"
            )
        if not self.output.exists():
            return False
        if described is None:
            if unfinished:  # earlier versions described it last
                return False
            raise UserError(
                f"--output: {self.output} exists, and {self.report.name} does not say how it was made; "
                "take another name, or remove it"
            )
        self._refuse_others(described, self.output, "samples", "take another name")
        try:
            with zipfile.ZipFile(self.output) as archive, archive.open("arr_0.npy") as file:
                np.lib.format.read_magic(file)
                found, _, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception:  # a damaged file can raise anything
            found, dtype = (), np.dtype(np.uint8)
        if found != self.shape or dtype != np.uint8:
            raise UserError(
                f"--output: {self.output} is not what {self.report.name} describes; remove it to sample anew"
            )
        return True

    def _refuse_others(self, before: dict, path: Path, what: str, remedy: str) -> None:
        changed = differing({**BEFORE, **before}, self.options, NOT_COMPARED)
        if changed:
            raise UserError(
                f"--output: {path} holds {what} with {changed[0]}; {remedy}, or remove {_kind(path)}"
            )

    def part(self, start: int) -> range:
        """The images of the part that begins with this one."""
        return range(start, min(start + PART_IMAGES, self.shape[0]))

    def parts(self) -> Iterator[range]:
        return map(self.part, range(0, self.shape[0], PART_IMAGES))

    def path(self, part: range) -> Path:
        return self.folder / f"{part.start:08d}.npy"

    def made(self, part: range) -> bool:
        """Whether a part is there, whole."""
        try:
            size = self.path(part).stat().st_size
        except OSError:
            return False
        return size == HEADER_BYTES + len(part) * int(np.prod(self.shape[1:]))

    def stored(self) -> int:
        """Images of all parts that are there."""
        return sum(len(part) for part in self.parts() if self.made(part))

    def write(self, part: range, images: np.ndarray) -> None:
        write_binary(self.path(part), lambda file: np.save(file, images))

    def _read(self, part: range) -> np.ndarray:
        try:
            images = read_array(self.path(part))
        except UserError:
            images = np.empty(0)
        if images.shape != (len(part), *self.shape[1:]) or images.dtype != np.uint8:
            raise UserError(f"--output: {self.path(part)} is damaged; remove it, and repeat the command")
        return images

    def leave(self) -> None:
        """Remove the folder if no part is stored: what was asked for may have been impossible."""
        if not any(self.made(part) for part in self.parts()):
            remove_folder(self.folder)

    def assemble(self, labels: Iterator[np.ndarray], report: dict) -> None:
        """Join the parts into one .npz, one part in memory at a time; ``labels`` [n] of each part in order.

        The description comes before it, so that an output which is there has one; then the parts go.
        """

        def write(temporary: Path) -> None:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                # An entry without a date: the same samples are the same bytes.
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                    header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    for part in self.parts():
                        file.write(self._read(part).tobytes())
                with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as file:
                    header = {"descr": "<i8", "fortran_order": False, "shape": self.shape[:1]}
                    np.lib.format.write_array_header_1_0(file, header)
                    for some in labels:
                        file.write(some.astype("<i8").tobytes())

        write_json(self.report, report)
        atomic_write(self.output, write)
        remove_folder(self.folder)


def _kind(path: Path) -> str:
    return "that folder" if path.is_dir() else "it"


def _read_report(path: Path) -> dict | None:
    """The options in a description that sample.py wrote; None for anything else."""
    try:
        content = parse_json(path.read_text())
    except (OSError, ValueError):
        return None
    options = content.get("options") if isinstance(content, dict) else None
    return options if isinstance(options, dict) and "num_samples" in options else None
