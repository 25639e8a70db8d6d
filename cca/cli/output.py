"""What one run of a command writes: where it may be, by which options it is known, and its lock.

A command writes a marker first, JSON with the options of the run, then its parts, and last the file with
which the output is finished. So whoever finds the output knows whose it is, and what is missing.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from models.utils.errors import UserError
from models.utils.files import (
    FORMAT,
    existing_part,
    read_json,
    reason,
    remove_folder,
    size_text,
    write_json,
    writing,
)

LONGEST_SUFFIX = 24  # bytes that names of temporary files and folders have more than the output's
NOT_COMPARED = ("weights",)  # how the path was spelled; the hash of the weights counts
HELD = (errno.EACCES, errno.EAGAIN)
# Seconds within which another machine sees a new file: NFS keeps what it knows of a folder for 60.
SEEN_SECONDS = 90


class OutputStatus(NamedTuple):
    """What lies at an output: the content of its marker or description, and whether it is finished."""

    content: dict | None = None
    is_finished: bool = False

    @property
    def options(self) -> dict:
        """The options of the run that began or finished the output; empty where there is none."""
        return options_of(self.content or {})


def options_of(content: Mapping) -> dict:
    """Return the options in a marker or description; a header of codes consists of them."""
    return content.get("options") or {k: v for k, v in content.items() if k not in ("format", "kind")}


@dataclass(frozen=True)
class Output:
    """Where a run writes.

    path: the file or folder that the user named; is_folder: which of the two.
    noun: what a finished output is called in messages, and in its marker and description.
    marker: JSON that is written before the first part; None: there are no parts.
    parts: the folder of what is made so far; pattern: of the names in it that can be resumed.
    last: the file that is written last; None: ``path``.
    description: JSON with the options of a finished output; None: what is there is never replaced.
    products: files that are written before the last one.
    advice: what a user may do when it is finished.
    """

    path: Path
    is_folder: bool = False
    noun: str = "results"
    marker: Path | None = None
    parts: Path | None = None
    last: Path | None = None
    description: Path | None = None
    products: tuple[Path, ...] = ()
    pattern: str = "*.npy"
    option: str = "--output"
    advice: str = "nothing is left to do"

    @classmethod
    def npz(cls, path: Path, noun: str) -> "Output":
        """FILE.npz, described in FILE.json, with its parts in FILE.npz.parts/. Raises UserError."""
        check_names_file(path)
        parts = path.with_name(f"{path.name}.parts")
        return cls(path, False, noun, parts / "options.json", parts, path, path.with_suffix(".json"))

    @classmethod
    def file(cls, path: Path, noun: str) -> "Output":
        """FILE, written at once and described in FILE.json, which is the file itself if that is its name.

        Raises UserError for a path that names no file.
        """
        check_names_file(path)
        return cls(path, False, noun, last=path, description=path.with_suffix(".json"))

    @classmethod
    def codes(cls, folder: Path) -> "Output":
        """DIR/codes.npy and DIR/labels.npy, described in DIR/header.json, with the parts in DIR/progress/."""
        parts, header = folder / "progress", folder / "header.json"
        products = (folder / "codes.npy", folder / "labels.npy")
        return cls(folder, True, "finished codes", parts / "header.json", parts, header, header, products)

    @classmethod
    def run(cls, folder: Path, checkpoint_name: str) -> "Output":
        """A run folder: DIR/config.json, checkpoints in DIR/state/, last the exported model."""
        config = folder / "config.json"
        last = folder / checkpoint_name
        advice = f"--weights {folder} with a new --output trains it on, with it as the reference"
        names = ("metrics.jsonl", "curves.png", "tensorboard", "wandb", "samples")
        products = tuple(folder / name for name in names)
        return cls(
            folder, True, "a run", config, folder / "state", last, config, products, "step-*", advice=advice
        )

    def check_place(self, inputs: Mapping[str, Path | None] | None = None, suffix: str = "") -> None:
        """Refuse a place that cannot be written to or that is an input. Writes nothing.

        Args:
            inputs: files and folders that the command reads, by option.
            suffix: with which the name has to end.

        Raises:
            UserError: names the option and what to do.
        """
        try:
            self._check_place()
            for name, given in (inputs or {}).items():
                if given is None or not os.path.exists(given):  # a reader says what is wrong with it
                    continue
                own, read = self.path.resolve(), given.resolve()
                if own == read or (read in own.parents and name != "--codes"):
                    where = "is" if own == read else "lies in"
                    raise UserError(
                        f"{self.option}: {self.path} {where} what {name} reads; take another name"
                    )
        except (OSError, RuntimeError) as error:  # of links in a circle
            raise self.cannot_write(reason(error)) from None
        if suffix and self.path.suffix != suffix:
            raise UserError(f"{self.option}: {self.path} does not end in {suffix}")

    def _check_place(self) -> None:
        path = self.path
        path.resolve()
        there = existing_part(path.absolute().parent)
        if not there.is_dir():
            raise self.cannot_write(f"{there} is not a folder")
        longest = os.pathconf(there, "PC_NAME_MAX") - LONGEST_SUFFIX
        if len(os.fsencode(path.name)) > longest:
            raise UserError(f"{self.option}: the name of the output is too long; at most {longest} bytes fit")
        if path.exists() and path.is_dir() != self.is_folder:
            wanted = "a file, a folder is wanted" if self.is_folder else "a folder, a file is wanted"
            raise self.cannot_write(f"it is {wanted}")
        place = path if self.is_folder and path.exists() else there
        if not os.access(place, os.W_OK | os.X_OK):
            raise self.cannot_write(f"{place} may not be written to")

    def cannot_write(self, why: str) -> UserError:
        """Return the error of an output that cannot be written."""
        return UserError(f"{self.option}: {self.path} cannot be written ({why})")

    def look(self) -> OutputStatus:
        """Return what lies there. Writes nothing.

        An output of which nothing is made yet may be begun anew, with other options: it counts as absent.
        Raises UserError for files in the way that no run of this command left, or left in another format.
        """
        begun = self._read(self.marker) if self.marker and self.marker.exists() else None
        if begun is None and self.marker and self.parts and (names := _names(self.parts)):
            raise UserError(
                f"{self.option}: {self.parts} is in the way, it holds {min(names)} "
                f"and no {self.marker.name} says how that was made; move it, or take another name"
            )
        described = None
        if self.description and self.description.exists():
            described = self._read(self.description)
        for path in (self.last, *self.products):
            if path and path.exists() and described is None and (begun is None or path == self.last):
                raise UserError(
                    f"{self.option}: {path} exists, and no record beside it says that this command made it; "
                    "take another name, or remove it"
                )
        if self.last and self.last.exists():
            return OutputStatus(described, True)
        return OutputStatus(begun if self.has_parts() else None, False)

    def has_parts(self) -> bool:
        """Return whether something is made that a run with the same options can resume."""
        return self.parts is not None and any(self.parts.glob(self.pattern))

    def _read(self, path: Path) -> dict:
        """Return the content of a marker or description. Raises UserError for what another command wrote."""
        content = read_json(path)
        found = content.get("format")
        if found != FORMAT or not isinstance(content.get("options", {}), dict):
            raise UserError(
                f"{self.option}: {path}: holds format {found!r} instead of {FORMAT}, or no options: "
                "this command did not write it; take another name"
            )
        if content.get("kind") != self.noun:
            raise UserError(
                f"{self.option}: {path} describes {content.get('kind')!r}, not {self.noun}; take another name"
            )
        return content

    def check(self, found: OutputStatus, options: Mapping) -> None:
        """Raise UserError where the output is of a run with other options than these."""
        changed = differing_options(found.options, options)
        if changed:
            what, remedy = self.noun, "take another name, or remove it"
            if not found.is_finished:
                what, remedy = "an unfinished run", "repeat its command, or take another name"
            raise UserError(f"{self.option}: {self.path} holds {what} with {', '.join(changed)}; {remedy}")

    @property
    def parts_folder(self) -> Path:
        assert self.parts is not None
        return self.parts

    def describe(self, content: Mapping) -> None:
        """Write the description of a finished output. Raises UserError."""
        assert self.description is not None
        write_json(self.description, {"format": FORMAT, "kind": self.noun, **content})

    def begin(self, content: Mapping) -> None:
        """Write the marker before the first part."""
        if self.marker is None or self.parts is None or self.has_parts():
            return
        with writing(self.parts):
            self.parts.mkdir(parents=True, exist_ok=True)
            if self.description != self.marker and self.description is not None:
                self.description.unlink(missing_ok=True)  # it describes an output that is gone
        write_json(self.marker, {"format": FORMAT, "kind": self.noun, **content})

    @property
    def _has_removable_parts(self) -> bool:
        """Whether the parts go once the output is there; the checkpoints of a run stay."""
        return self.marker is not None and self.marker.parent == self.parts

    def remove_parts(self) -> None:
        """Remove the parts of a finished output."""
        if self.parts is not None and self._has_removable_parts:
            remove_folder(self.parts)

    def leave(self) -> None:
        """Remove what was begun if nothing came of it: what was asked for may have been impossible.

        Of a run that is as long as no step is logged.
        """
        is_finished = self.last is not None and self.last.exists()
        if self.marker is None or self.parts is None or self.has_parts() or is_finished:
            return
        if self._has_removable_parts:
            self.remove_parts()
        elif not any(path.is_file() and path.stat().st_size for path in self.products):
            products = [path for path in (self.parts, *self.products) if os.path.lexists(path)]
            for path in products:  # while one of them cannot be removed, the marker says whose it is
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            if not any(os.path.lexists(path) for path in products):
                self.marker.unlink(missing_ok=True)

    def _lock_path(self) -> Path:
        real = self.path.resolve()
        return real / ".lock" if self.is_folder else real.with_name(f".{real.name}.lock")

    @contextmanager
    def lock(self) -> Iterator[str]:
        """Hold the output against other runs, with a lock that ends with this process.

        Missing folders are made, and removed again where nothing was written to them. Yields what the lock
        file holds, by which other ranks of the run know it (``check_seen``). A file system that has no
        locks gets a warning. Raises UserError where another run holds the output, or it cannot be written.
        """
        made: list[Path] = []
        try:
            try:
                lock = self._lock_path()
                for parent in reversed([p for p in (lock.parent, *lock.parent.parents) if not p.exists()]):
                    parent.mkdir(exist_ok=True)
                    made.append(parent)
                file = self._open_lock(lock)
                note = f"process {os.getpid()} on {socket.gethostname()}\n{secrets.token_hex(16)}\n"
                file.truncate(0)
                file.write(note)
                file.flush()
                os.fsync(file.fileno())  # for other machines
            except OSError as error:
                raise self.cannot_write(reason(error)) from None
            try:
                yield note
            finally:
                with suppress(OSError):
                    lock.unlink()
                file.close()
        finally:
            for parent in reversed(made):
                with suppress(OSError):
                    parent.rmdir()

    def _open_lock(self, lock: Path):
        """Return the lock file, open and locked.

        The lock is the process's own (POSIX): a data-loading worker that was forked from it, and that may
        live on for seconds after its parent was killed, does not hold it.
        """
        while True:
            file = open(lock, "a+")  # noqa: SIM115, open for as long as it is held
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in HELD:
                    print(
                        f"warning: {self.option}: locks do not work at {self.path} ({reason(error)}); "
                        "see to it that no other run writes there",
                        file=sys.stderr,
                    )
                    return file
                file.seek(0)
                holder = file.readline(200).strip() or "another process"
                file.close()
                raise UserError(
                    f"{self.option}: {self.path} is being written by {holder}; wait for it to end, or end it"
                ) from None
            with suppress(FileNotFoundError):  # the run before may have removed it in between
                if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                    return file
            file.close()

    def check_seen(self, note: str) -> None:
        """Raise UserError unless this is the output that rank 0 has locked.

        note: what ``locked`` gave there. Another machine may see it with delay, and is given the time.
        """
        holder, own = note.splitlines()[0], socket.gethostname()
        end = time.monotonic() + (0 if holder.endswith(f" on {own}") else SEEN_SECONDS)
        while True:
            with suppress(OSError):  # it is not there, or not yet
                if self._lock_path().read_text() == note:
                    return
            if time.monotonic() >= end:
                break
            time.sleep(1)
        raise UserError(
            f"{self.option}: {self.path} on {own} is not the folder that {holder} writes to; "
            "all nodes need one folder that they share"
        )


def check_names_file(path: Path) -> None:
    """Raise UserError for a path such as "" or "/"."""
    if not path.name:
        raise UserError(f"--output: {path} names no file")


def _names(folder: Path) -> set[str]:
    """Return the names in a folder, if it is there, without hidden ones."""
    return {name for name in os.listdir(folder) if not name.startswith(".")} if folder.is_dir() else set()


def check_space(output: Output, needed: int, what: str) -> None:
    """Raise UserError where fewer than ``needed`` bytes are free; ``what`` says what they are for."""
    usage = shutil.disk_usage(existing_part(output.path))
    if needed > usage.free and usage.total:  # some file systems, /proc among them, have no sizes
        raise UserError(
            f"{output.option}: {output.path} has {size_text(usage.free)} free, the run needs "
            f"{size_text(needed)}, {size_text(needed - usage.free)} more ({what})"
        )


def differing_options(before: Mapping, now: Mapping) -> list[str]:
    """Return the options that differ, each as "NAME BEFORE instead of NOW"; one side may know fewer."""
    before, now = json.loads(json.dumps([before, now]))  # as they read back: tuples become lists
    both = [name for name in now if name in before and name not in NOT_COMPARED]
    changed = [name for name in both if before[name] != now[name]]
    return [f"{name} {before[name]!s:.60} instead of {now[name]!s:.60}" for name in changed]
