"""Users' mistakes: one line on stderr, exit status 2, no traceback."""

import errno
import io
import os
import sys
import time
from collections.abc import Callable

# What a user's disk or permissions cause wherever a path is used, and no check foresees for certain.
OF_THE_MACHINE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTDIR,
    errno.EISDIR, errno.ELOOP, errno.EIO,
}  # fmt: skip


class UserError(Exception):
    """What the user can put right; the message names the option, file or tensor at fault."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's ``main`` and turn a UserError into its one line.

    Whatever the terminal's encoding, text is printed; where standard output is closed before the end
    (``| head -1``) the command does its work without printing.
    """
    outlets = [_replace_stream(name) for name in ("stdout", "stderr")]
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
        for outlet in outlets:
            if outlet and outlet.lost and outlet.lost.errno != errno.EPIPE:  # else its reader left
                raise UserError(f"standard output cannot be written ({outlet.lost.strerror})")
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and (error.errno not in OF_THE_MACHINE or error.filename is None):
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # all make most mistakes; torchrun ends this one here if the main one said so
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:  # where there is nothing to save
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def one_line(error: UserError | OSError) -> str:
    """The message, with what would break the line or not show (file names may hold it) as escapes."""
    # A data loader's worker process hands its error on behind a traceback.
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    return printable(text.rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip())


def printable(text: str) -> str:
    """The text on one line, with escapes for what would break it, steer a terminal, or not show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Outlet(io.FileIO):
    """Where printed text goes; what can no longer be written is dropped, so that the work goes on."""

    lost: OSError | None = None  # why text was dropped

    def write(self, data) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            self.lost = error
            return memoryview(data).nbytes


def _replace_stream(name: str) -> _Outlet | None:
    """Give sys.stdout or sys.stderr an _Outlet, and escapes for what its encoding lacks."""
    stream = getattr(sys, name)
    if stream is None or stream is not getattr(sys, f"__{name}__"):
        return None  # closed, or not the process's own
    outlet = _Outlet(stream.fileno(), "wb", closefd=False)
    text = io.TextIOWrapper(
        io.BufferedWriter(outlet), stream.encoding, "backslashreplace",
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip
    setattr(sys, name, text)
    return outlet
