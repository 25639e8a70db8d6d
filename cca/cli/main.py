"""The steps of every command, in order: inspect the output, print the plan, lock, work, finish."""

import errno
import io
import os
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from cca.cli.output import Output, OutputStatus, check_space, differing_options, options_of
from cca.cli.parts import Parts
from cca.cli.plan import show_plan
from cca.distributed import Ranks
from models.utils.errors import UserError, one_line
from models.zoo.hub import Download, require_space

# Errors of the user's disk or permissions. Any use of a path may raise them; no check predicts all of them.
OF_THE_MACHINE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTDIR,
    errno.EISDIR, errno.ELOOP, errno.EIO,
}  # fmt: skip


@dataclass
class OnePart:
    """The job of a command that writes one file in one step.

    rows: the plan. make: function that writes the file; it runs on rank 0.
    """

    ranks: Ranks
    rows: dict[str, str]
    make: Callable[[], None]
    downloads: Sequence[Download] = ()
    parts: Parts | None = None

    def identity(self) -> dict:
        return {}

    def plan(self) -> dict[str, str]:
        return self.rows

    def prepare(self) -> dict:
        return {}

    def work(self, content: dict) -> bool:
        self.ranks.run_or_abort_all(self.make, on_rank0=True)
        return True


def play(
    args: Namespace, output: Output | None, resolve: Callable[[Namespace, Ranks, OutputStatus], Any]
) -> Any:
    """Run a command.

    Args:
        args: parsed options, with ``dry_run``.
        output: what the command writes; None if it writes nothing.
        resolve: function that returns the job for the options, the ranks and the status of the output.

    A job has these attributes and methods:
        identity(): the options that identify its output, as far as they are known without network.
        parts: the parts of the output, or None.
        plan(): the rows of the plan. It raises UserError if the work is impossible.
        downloads: the files that ``prepare`` will download.
        prepare(): loads what the work needs and returns the content of the marker.
        work(content): writes the output; ``content`` is what ``prepare`` returned. It returns False if a
            signal stopped it.

    Returns:
        the job if its output is finished; None after a dry run or a stop signal.

    Raises:
        UserError: on the rank where a check failed; the other ranks exit.
    """
    ranks = Ranks()
    status = ranks.broadcast_from_rank0(output.look) if output else OutputStatus()
    job = resolve(args, ranks, status)
    ranks.run_or_abort_all(partial(show, output, status, job), on_rank0=True)
    ranks.run_or_abort_all(partial(require_space, job.downloads))  # all ranks check before one downloads
    if args.dry_run:
        return None
    content = job.prepare()
    refuse_other_options(ranks, options_of(content))
    if output is None:
        return job if job.work(content) else None
    with ExitStack() as stack:
        lock, is_finished = ranks.broadcast_from_rank0(partial(claim, output, content, stack))
        # Rank 0 must not read the lock file: closing the file would release its own lock.
        ranks.run_or_abort_all(partial(output.check_seen, lock) if not ranks.is_main else lambda: None)
        if is_finished and ranks.is_main:
            print(f"{output.path} is finished already, with these options; {output.advice}")
        return job if is_finished or make(ranks, output, content, job) else None


def show(output: Output | None, status: OutputStatus, job: Any) -> None:
    """Print the plan. Raise UserError if the work is impossible or the output belongs to another run."""
    if output:
        output.check(status, job.identity())
    rows = job.plan()
    if output and status.is_finished:
        rows["finished"] = f"{output.path} is there already, with these options"
    elif output and job.parts:
        check_space(output, job.parts.space_needed(), "its parts, then one file of all parts")
        if status.content:
            stored, count = job.parts.rows_stored(), job.parts.shape[0]
            rows["resumes"] = f"with the {stored:,} of {count:,} images that are stored"
    show_plan(rows, job.downloads)


def claim(output: Output, content: Mapping, stack: ExitStack) -> tuple[str, bool]:
    """Lock the output until the stack is closed; return (content of the lock file, whether it is finished).

    Raise UserError if another run holds the lock or the output belongs to another run.
    """
    lock = stack.enter_context(output.lock())
    status = output.look()
    output.check(status, options_of(content))
    if status.is_finished:
        output.remove_parts()
    return lock, status.is_finished


def make(ranks: Ranks, output: Output, content: Mapping, job: Any) -> bool:
    """Write the marker with ``content``, do a job's work, remove its parts; return whether it is done."""
    try:
        ranks.run_or_abort_all(partial(output.begin, content), on_rank0=True)
        is_done = job.work(content)
        if is_done and ranks.is_main:
            output.remove_parts()
        return is_done
    finally:
        if ranks.is_main:
            output.leave()


def refuse_other_options(ranks: Ranks, options: Mapping) -> None:
    """Raise UserError on a rank whose options (with hashes of files) differ from those of rank 0."""
    rank0_options = ranks.all_gather(options)[0]

    def compare() -> None:
        if changed := differing_options(options, rank0_options):
            raise UserError(
                f"rank {ranks.rank} on {socket.gethostname()}: {changed[0]} on rank 0; "
                "all nodes need the same options and files"
            )

    ranks.run_or_abort_all(compare)


def run_command(main: Callable[[], None]) -> None:
    """Run a command's ``main``; print a UserError as one line and exit with status 2.

    Characters that the terminal's encoding lacks are printed as escapes. If standard output is closed early
    (``| head -1``), the command finishes its work without printing.
    """
    if sys.stderr is None:  # closed (2>&-): the next file to be opened would get descriptor 2
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    outlets = [_replace_stream(name) for name in ("stdout", "stderr")]
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
        error = outlets[0] and outlets[0].error
        if error and error.errno != errno.EPIPE:  # EPIPE: the reader of a pipe has ended, as with head
            raise UserError(f"standard output cannot be written ({error.strerror})")
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and (error.errno not in OF_THE_MACHINE or error.filename is None):
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(
                2
            )  # most errors occur on all ranks: torchrun ends this rank while it waits if rank 0 printed it
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:  # raised only while there is nothing to save
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


class _Outlet(io.FileIO):
    """A raw output stream that drops text which cannot be written, so that the work continues."""

    error: OSError | None = None  # the last error of a write

    def write(self, data) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            self.error = error
            return memoryview(data).nbytes


def _replace_stream(name: str) -> _Outlet | None:
    """Make sys.stdout or sys.stderr an _Outlet that prints escapes for characters outside its encoding."""
    stream = getattr(sys, name)
    if stream is None or stream is not getattr(sys, f"__{name}__"):
        return None  # the stream is closed, or somebody has replaced it
    outlet = _Outlet(stream.fileno(), "wb", closefd=False)
    text = io.TextIOWrapper(
        io.BufferedWriter(outlet), stream.encoding, "backslashreplace",
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip
    setattr(sys, name, text)
    return outlet
