"""The output of a command: where it is, the options that identify it, and its lock.

A command first writes a marker (JSON with the options of the run), then the parts, and last the file that
makes the output finished. So the files themselves show which run wrote the output and what is missing.
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
    VERSION,
    existing_part,
    read_json,
    reason,
    remove_folder,
    size_text,
    write_json,
    writing,
)

LONGEST_SUFFIX = 24  # bytes that temporary files and folders add to the name of the output
NOT_COMPARED = ("weights",)  # the path of the weights may differ; their hash is compared
HELD = (errno.EACCES, errno.EAGAIN)
# Seconds until another machine surely sees a new file: NFS caches the list of a folder for up to 60.
SEEN_SECONDS = 90


class OutputStatus(NamedTuple):
    """The status of an output: the content of its marker or description, and whether it is finished."""

    content: dict | None = None
    is_finished: bool = False

    @property
    def options(self) -> dict:
        """The options of the run that started or finished the output; empty if there is none."""
        return options_of(self.content or {})


def options_of(content: Mapping) -> dict:
    """Return the options in a marker or description. In a header of codes they are the top-level keys."""
    return content.get("options") or {k: v for k, v in content.items() if k not in ("format", "kind")}


@dataclass(frozen=True)
class Output:
    """The output of a run.

    path: the file or folder that the user named.
    is_folder: whether ``path`` is a folder.
    noun: name of a finished output in messages, and in its marker and description.
    marker: JSON that is written before the first part; None if there are no parts.
    parts: the folder of the parts (or checkpoints).
    last: the file that is written last.
    description: JSON with the options of a finished output; None means that files are never replaced.
    products: files and folders that are written before ``last``.
    pattern: glob pattern of the parts from which a run can resume.
    option: the option that sets ``path``.
    advice: what the user can do with a finished output.
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
        """Return the output FILE.npz, described in FILE.json, with its parts in FILE.npz.parts/.

        Raise UserError if ``path`` has no file name.
        """
        check_names_file(path)
        parts = path.with_name(f"{path.name}.parts")
        return cls(path, False, noun, parts / "options.json", parts, path, path.with_suffix(".json"))

    @classmethod
    def file(cls, path: Path, noun: str) -> "Output":
        """Return the output FILE, written in one step and described in FILE.json (which may be FILE itself).

        Raise UserError if ``path`` has no file name.
        """
        check_names_file(path)
        return cls(path, False, noun, last=path, description=path.with_suffix(".json"))

    @classmethod
    def codes(cls, folder: Path) -> "Output":
        """Return the output DIR: codes.npy and labels.npy, header.json, and the parts in progress/."""
        parts, header = folder / "progress", folder / "header.json"
        products = (folder / "codes.npy", folder / "labels.npy")
        return cls(folder, True, "finished codes", parts / "header.json", parts, header, header, products)

    @classmethod
    def run(cls, folder: Path, checkpoint_name: str) -> "Output":
        """Return the run folder DIR: config.json, checkpoints in state/, and last the exported model."""
        config = folder / "config.json"
        last = folder / checkpoint_name
        advice = (
            f"--weights {folder} with a new --output starts another run from it, with it as the reference"
        )
        names = ("metrics.jsonl", "curves.png", "tensorboard", "wandb", "samples")
        products = tuple(folder / name for name in names)
        return cls(
            folder, True, "a run", config, folder / "state", last, config, products, "step-*", advice=advice
        )

    def check_place(self, inputs: Mapping[str, Path | None] | None = None, suffix: str = "") -> None:
        """Raise UserError if the output cannot be written or is one of the inputs. Writes nothing.

        Args:
            inputs: files and folders that the command reads, by option.
            suffix: required suffix of the name.
        """
        try:
            self._check_place()
            for name, path in (inputs or {}).items():
                if path is None or not os.path.exists(path):  # whoever reads it reports a missing file
                    continue
                own, source = self.path.resolve(), path.resolve()
                if own == source or (source in own.parents and name != "--codes"):
                    where = "is" if own == source else "lies in"
                    raise UserError(
                        f"{self.option}: {self.path} {where} what {name} reads; choose another path"
                    )
        except (OSError, RuntimeError) as error:  # such as links in a circle
            raise self.cannot_write(reason(error)) from None
        if suffix and self.path.suffix != suffix:
            raise UserError(f"{self.option}: {self.path} does not end in {suffix}")

    def _check_place(self) -> None:
        path = self.path
        path.resolve()
        parent = existing_part(path.absolute().parent)
        if not parent.is_dir():
            raise self.cannot_write(f"{parent} is not a folder")
        longest = os.pathconf(parent, "PC_NAME_MAX") - LONGEST_SUFFIX
        if len(os.fsencode(path.name)) > longest:
            raise UserError(f"{self.option}: the name has more than {longest} bytes; choose a shorter name")
        if path.exists() and path.is_dir() != self.is_folder:
            raise self.cannot_write(
                "it is a file; expected a folder" if self.is_folder else "it is a folder; expected a file"
            )
        folder = path if self.is_folder and path.exists() else parent
        if not os.access(folder, os.W_OK | os.X_OK):
            raise self.cannot_write(f"no permission to write to {folder}")

    def cannot_write(self, why: str) -> UserError:
        """Return the error for an output that cannot be written."""
        return UserError(f"{self.option}: {self.path} cannot be written ({why})")

    def look(self) -> OutputStatus:
        """Return the status of the output. Writes nothing.

        An output without parts counts as absent, so that a run with other options may start it again.
        Raise UserError for files that this command did not write, or wrote in another format.
        """
        marker = self._read(self.marker) if self.marker and self.marker.exists() else None
        if marker is None and self.marker and self.parts and (names := _names(self.parts)):
            raise UserError(
                f"{self.option}: {self.parts} holds {min(names)} but no {self.marker.name} with the options "
                "of its run; move that folder, or choose another path"
            )
        description = None
        if self.description and self.description.exists():
            description = self._read(self.description)
        for path in (self.last, *self.products):
            if path and path.exists() and description is None and (marker is None or path == self.last):
                raise UserError(
                    f"{self.option}: {path} exists, but no file beside it shows that this command wrote it; "
                    "remove it, or choose another path"
                )
        if self.last and self.last.exists():
            return OutputStatus(description, True)
        return OutputStatus(marker if self.has_parts() else None, False)

    def has_parts(self) -> bool:
        """Return whether there are parts from which a run with the same options can resume."""
        return self.parts is not None and any(self.parts.glob(self.pattern))

    def _read(self, path: Path) -> dict:
        """Return the content of a marker or description. Raise UserError if another command wrote it."""
        content = read_json(path)
        file_format = content.get("format")
        if file_format != FORMAT or not isinstance(content.get("options", {}), dict):
            raise UserError(
                f"{self.option}: {path}: holds format {file_format!r} instead of {FORMAT}, or no options; "
                "this version did not write it; choose another path"
            )
        if content.get("kind") != self.noun:
            raise UserError(
                f"{self.option}: {path} describes {content.get('kind')!r}, not {self.noun}; "
                "choose another path"
            )
        return content

    def check(self, status: OutputStatus, options: Mapping) -> None:
        """Raise UserError if the output belongs to a run with other options than these."""
        changed = differing_options(status.options, options)
        if changed:
            what, remedy = self.noun, "remove it, or choose another path"
            if not status.is_finished:
                what, remedy = "an unfinished run", "repeat its command, or choose another path"
            raise UserError(f"{self.option}: {self.path} holds {what} with {', '.join(changed)}; {remedy}")

    @property
    def parts_folder(self) -> Path:
        assert self.parts is not None
        return self.parts

    def describe(self, content: Mapping) -> None:
        """Write the description of a finished output. Raise UserError if that fails."""
        assert self.description is not None
        write_json(self.description, {"format": FORMAT, "kind": self.noun, "version": VERSION, **content})

    def begin(self, content: Mapping) -> None:
        """Write the marker, before the first part. Raise UserError if that fails."""
        if self.marker is None or self.parts is None or self.has_parts():
            return
        with writing(self.parts):
            self.parts.mkdir(parents=True, exist_ok=True)
            if self.description != self.marker and self.description is not None:
                self.description.unlink(missing_ok=True)  # it describes an output that was removed
        write_json(self.marker, {"format": FORMAT, "kind": self.noun, "version": VERSION, **content})

    @property
    def _has_removable_parts(self) -> bool:
        """Whether the parts are removed when the output is finished; the checkpoints of a run stay."""
        return self.marker is not None and self.marker.parent == self.parts

    def remove_parts(self) -> None:
        """Remove the parts of a finished output."""
        if self.parts is not None and self._has_removable_parts:
            remove_folder(self.parts)

    def leave(self) -> None:
        """Remove the marker and empty folders if the run made no parts, as when its options were impossible.

        A run folder is kept as soon as one step is logged.
        """
        is_finished = self.last is not None and self.last.exists()
        if self.marker is None or self.parts is None or self.has_parts() or is_finished:
            return
        if self._has_removable_parts:
            self.remove_parts()
        elif not any(path.is_file() and path.stat().st_size for path in self.products):
            products = [path for path in (self.parts, *self.products) if os.path.lexists(path)]
            for path in products:  # the marker stays while a file remains, to identify its run
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            if not any(os.path.lexists(path) for path in products):
                self.marker.unlink(missing_ok=True)

    def _lock_path(self) -> Path:
        real = self.path.resolve()
        return real / ".lock" if self.is_folder else real.with_name(f".{real.name}.lock")

    @contextmanager
    def lock(self) -> Iterator[str]:
        """Context manager that locks the output against other runs; the lock ends with this process.

        It creates missing folders, and removes them again if they stay empty. It yields the content of the
        lock file, by which the other ranks recognise it (``check_seen``). It prints a warning if the file
        system has no locks. Raise UserError if another run holds the lock, or the output cannot be written.
        """
        new_folders: list[Path] = []
        try:
            try:
                lock = self._lock_path()
                for parent in reversed([p for p in (lock.parent, *lock.parent.parents) if not p.exists()]):
                    parent.mkdir(exist_ok=True)
                    new_folders.append(parent)
                file = self._open_lock(lock)
                note = f"process {os.getpid()} on {socket.gethostname()}\n{secrets.token_hex(16)}\n"
                file.truncate(0)
                file.write(note)
                file.flush()
                os.fsync(file.fileno())  # so that other machines see it
            except OSError as error:
                raise self.cannot_write(reason(error)) from None
            try:
                yield note
            finally:
                with suppress(OSError):
                    lock.unlink()
                file.close()
        finally:
            for parent in reversed(new_folders):
                with suppress(OSError):
                    parent.rmdir()

    def _open_lock(self, lock: Path):
        """Return the lock file, open and locked.

        A POSIX lock belongs to the process. Data-loading workers that were forked from it do not hold the
        lock, although they may outlive it by seconds if it is killed.
        """
        while True:
            file = open(lock, "a+")  # noqa: SIM115, it stays open while the lock is held
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in HELD:
                    print(
                        f"warning: {self.option}: locks do not work at {self.path} ({reason(error)}); "
                        "make sure that no other run writes there",
                        file=sys.stderr,
                    )
                    return file
                file.seek(0)
                holder = file.readline(200).strip() or "another process"
                file.close()
                raise UserError(
                    f"{self.option}: {self.path} is being written by {holder}; wait until it ends, or stop it"
                ) from None
            with suppress(FileNotFoundError):  # the previous run may just have removed it
                if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                    return file
            file.close()

    def check_seen(self, note: str) -> None:
        """Raise UserError unless this is the output that rank 0 has locked.

        ``note`` is the content of the lock file on rank 0. Another machine may see it late, so this waits up
        to ``SEEN_SECONDS``.
        """
        holder, own = note.splitlines()[0], socket.gethostname()
        end = time.monotonic() + (0 if holder.endswith(f" on {own}") else SEEN_SECONDS)
        while True:
            with suppress(OSError):  # the file does not exist, or not yet
                if self._lock_path().read_text() == note:
                    return
            if time.monotonic() >= end:
                break
            time.sleep(1)
        raise UserError(
            f"{self.option}: {self.path} on {own} is not the folder that {holder} writes to; "
            "all nodes need the same shared folder"
        )


def check_names_file(path: Path) -> None:
    """Raise UserError for a path without a file name, such as "" or "/"."""
    if not path.name:
        raise UserError(f"--output: {path} is not a file name")


def _names(folder: Path) -> set[str]:
    """Return the names in a folder without hidden ones; the empty set if it does not exist."""
    return {name for name in os.listdir(folder) if not name.startswith(".")} if folder.is_dir() else set()


def check_space(output: Output, needed: int, what: str) -> None:
    """Raise UserError if fewer than ``needed`` bytes are free; ``what`` says what they are for."""
    usage = shutil.disk_usage(existing_part(output.path))
    if needed > usage.free and usage.total:  # some file systems, such as /proc, report size 0
        raise UserError(
            f"{output.option}: {output.path} has {size_text(usage.free)} free, the run needs "
            f"{size_text(needed)}, {size_text(needed - usage.free)} more ({what})"
        )


def differing_options(before: Mapping, now: Mapping) -> list[str]:
    """Return the options in both that differ, each as "NAME BEFORE instead of NOW"."""
    before, now = json.loads(json.dumps([before, now]))  # in JSON tuples become lists
    both = [name for name in now if name in before and name not in NOT_COMPARED]
    changed = [name for name in both if before[name] != now[name]]
    return [f"{name} {before[name]!s:.60} instead of {now[name]!s:.60}" for name in changed]
