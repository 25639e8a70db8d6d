"""Outputs of commands: what may be written where, by one run at a time, and what a run before left there."""

import errno
import fcntl
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from models.errors import UserError
from models.files import reason

LONGEST_SUFFIX = 24  # bytes that names of temporary files and folders have more than the output's
HELD = (errno.EACCES, errno.EAGAIN)
# Within which a new file is seen by other machines: NFS keeps what it knows of a folder for 60 seconds.
SEEN_SECONDS = 90


def check_output(
    option: str, path: Path, inputs: Mapping[str, Path | None] | None = None, folder: bool = False
) -> None:
    """Refuse an output that could not be written or would overwrite an input; writes nothing itself.

    Args:
        inputs: what the command reads, by option; the same file or folder is refused.
        folder: the output is a folder, which may exist; otherwise it is a file.

    Raises:
        UserError: names ``option`` and what to do.
    """
    try:
        _check_place(option, path, folder)
        for name, given in (inputs or {}).items():
            if given is not None and given.exists() and path.resolve() == given.resolve():
                raise UserError(f"{option}: {path} is what {name} reads; take another name")
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written ({reason(error)})") from None


def _check_place(option: str, path: Path, folder: bool) -> None:
    parents = list(path.absolute().parents)
    there = next(parent for parent in parents if _is_there(parent))
    if not there.is_dir():
        raise UserError(f"{option}: {path} cannot be written ({there} is not a folder)")
    longest = os.pathconf(there, "PC_NAME_MAX") - LONGEST_SUFFIX
    if len(os.fsencode(path.name)) > longest:
        raise UserError(f"{option}: the name of the output is too long; at most {longest} bytes fit")
    if path.exists() and path.is_dir() != folder:
        wanted = "it is a file, a folder is wanted" if folder else "it is a folder, a file is wanted"
        raise UserError(f"{option}: {path} cannot be written ({wanted})")
    place = path if folder and path.exists() else there
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{option}: {path} cannot be written ({place} may not be written to)")


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


def check_space(option: str, path: Path, needed: int, what: str) -> None:
    """Raise UserError where fewer than ``needed`` bytes are free; ``what`` says what they are for."""
    there = next(parent for parent in path.absolute().parents if _is_there(parent))
    usage = shutil.disk_usage(there)
    free = usage.free
    if needed > free and usage.total:  # some file systems, /proc among them, have no sizes
        raise UserError(
            f"{option}: {path.parent} has {free / 1e9:.1f} GB free, "
            f"the run needs {needed / 1e9:.1f} GB ({what})"
        )


@contextmanager
def claimed(path: Path, folder: bool = False, option: str = "--output") -> Iterator[str]:
    """Hold an output against other runs, with a lock that dies with the process; missing folders are made.

    The lock lies beside an output file, or in an output folder, and is removed at the end; so are the
    folders that were made, if nothing was written to them. A file system that cannot lock gets a warning.

    Yields what the lock holds, by which the run's other processes know it (``check_seen``).

    Raises UserError where another run holds it, or nothing can be written there.
    """
    made: list[Path] = []
    try:
        try:
            lock = _lock_of(path, folder)
            for parent in reversed([p for p in (lock.parent, *lock.parent.parents) if not p.exists()]):
                parent.mkdir(exist_ok=True)
                made.append(parent)
            file = _open_and_lock(lock, path, option)
            note = f"process {os.getpid()} on {socket.gethostname()}\n{secrets.token_hex(16)}\n"
            file.truncate(0)
            file.write(note)
            file.flush()
            os.fsync(file.fileno())  # for other machines
        except OSError as error:
            raise UserError(f"{option}: {path} cannot be written ({reason(error)})") from None
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


def check_seen(path: Path, folder: bool, note: str, option: str = "--output") -> None:
    """Raise UserError unless the output is the one that another process of this run has claimed.

    note: what ``claimed`` gave there. Another machine may see it with delay, and is given the time.
    """
    holder, own = note.splitlines()[0], socket.gethostname()
    last = time.monotonic() + (0 if holder.endswith(f" on {own}") else SEEN_SECONDS)
    while True:
        try:
            with open(_lock_of(path, folder)) as file:
                if file.read() == note:
                    return
        except OSError:  # not there, or not yet
            pass
        if time.monotonic() >= last:
            break
        time.sleep(1)
    raise UserError(
        f"{option}: {path} on {own} is not the folder that {holder} writes to; "
        "all nodes need one folder that they share"
    )


def _lock_of(path: Path, folder: bool) -> Path:
    real = path.resolve()
    return real / ".lock" if folder else real.with_name(f".{real.name}.lock")


def _open_and_lock(lock: Path, path: Path, option: str):
    """The lock file, open and locked.

    The lock is that of the process (POSIX): a loader forked from it, which may live on for seconds after
    its parent was killed, does not hold it.
    """
    while True:
        file = open(lock, "a+")  # noqa: SIM115, open for as long as it is held
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in HELD:
                print(
                    f"warning: {option}: locks do not work at {path} ({reason(error)}); "
                    "see to it that no other run writes there",
                    file=sys.stderr,
                )
                return file
            file.seek(0)
            holder = file.readline(200).strip() or "another process"
            file.close()
            raise UserError(
                f"{option}: {path} is being written by {holder}; wait for it to end, or end it"
            ) from None
        with suppress(FileNotFoundError):  # the run before may have removed it in between
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                return file
        file.close()


def differing(before: Mapping, now: Mapping, ignored: tuple[str, ...] = ()) -> list[str]:
    """Options that differ, each as "NAME BEFORE instead of NOW"; what was not noted before is accepted."""
    changed = [k for k, v in now.items() if before.get(k, v) != v and k not in ignored]
    return [f"{name} {before[name]} instead of {now[name]}" for name in changed]
