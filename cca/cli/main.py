"""The order in which every command runs: look at the output, show the plan, lock, work, finish."""

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

# What a user's disk or permissions cause wherever a path is used, and no check foresees for certain.
OF_THE_MACHINE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTDIR,
    errno.EISDIR, errno.ELOOP, errno.EIO,
}  # fmt: skip


@dataclass
class OnePart:
    """The job of a command that writes one file at once.

    rows: the plan. make: writes the file, on rank 0.
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

    def work(self) -> bool:
        self.ranks.run_or_abort_all(self.make, on_rank0=True)
        return True


def play(
    args: Namespace, output: Output | None, resolve: Callable[[Namespace, Ranks, OutputStatus], Any]
) -> Any:
    """Run a command.

    Args:
        args: parsed options, ``dry_run`` among them.
        output: what the command writes; None: nothing.
        resolve: makes the job from the options and from what was found at the output. A job has
            ``known()``, the options that its output is known by, as far as they are known without network;
            ``parts`` of the output, if it is made in such;
            ``plan()``, what is shown before the work, which refuses what cannot be done; ``downloads``;
            ``prepare()``, which gets what the work needs and returns the content of the marker; and
            ``work()``, which makes the output, and returns False where a signal came first.

    Returns:
        the job, when its output is finished; None after a dry run, or where a signal came first.

    Raises:
        UserError: on the rank that refused; the others end.
    """
    ranks = Ranks()
    found = OutputStatus(*ranks.broadcast_from_rank0(output.look)) if output else OutputStatus()
    job = resolve(args, ranks, found)
    ranks.run_or_abort_all(partial(show, output, found, job), on_rank0=True)
    if args.dry_run:
        return None
    ranks.run_or_abort_all(partial(require_space, job.downloads))  # all look before the first one downloads
    content = job.prepare()
    refuse_other_options(ranks, options_of(content))
    if output is None:
        return job if job.work() else None
    with ExitStack() as stack:
        lock, is_finished = ranks.broadcast_from_rank0(partial(claim, output, content, stack))
        # Rank 0 does not look: its lock would end when it closes the file.
        ranks.run_or_abort_all(partial(output.check_seen, lock) if not ranks.is_main else lambda: None)
        if is_finished and ranks.is_main:
            print(f"{output.path} is finished already, with these options; {output.advice}")
        return job if is_finished or make(ranks, output, content, job) else None


def show(output: Output | None, found: OutputStatus, job: Any) -> None:
    """Print what the job does. Raises UserError where it cannot be done, or the output is of another run."""
    if output:
        output.check(found, job.identity())
    rows = job.plan()
    if output and found.is_finished:
        rows["finished"] = f"{output.path} is there already, with these options"
    elif output and job.parts:
        check_space(output, job.parts.space_needed(), "its parts, then all of them in one file")
        if found.content:
            stored, count = job.parts.rows_stored(), job.parts.shape[0]
            rows["resumes"] = f"with the {stored:,} of {count:,} images that are stored"
    show_plan(rows, job.downloads)


def claim(output: Output, content: Mapping, stack: ExitStack) -> tuple[str, bool]:
    """Lock the output until the stack is closed; return what the lock holds, and whether it is finished.

    Raises UserError where another run holds it, or it is of another run.
    """
    lock = stack.enter_context(output.lock())
    found = output.look()
    output.check(found, options_of(content))
    if found.is_finished:
        output.remove_parts()
    return lock, found.is_finished


def make(ranks: Ranks, output: Output, content: Mapping, job: Any) -> bool:
    """Do the work on an output that is locked; ``content``: of its marker."""
    try:
        ranks.run_or_abort_all(partial(output.begin, content), on_rank0=True)
        return job.work()
    finally:
        if ranks.is_main:
            output.leave()


def refuse_other_options(ranks: Ranks, options: Mapping) -> None:
    """Raise UserError unless all ranks work with the options, hashes and so on (JSON) of rank 0."""
    if ranks.world_size == 1:
        return
    of_rank_0 = ranks.broadcast_from_rank0(partial(dict, options))

    def compare() -> None:
        if changed := differing_options(options, of_rank_0):
            raise UserError(
                f"process {ranks.rank} on {socket.gethostname()}: has {changed[0]} of process 0; "
                "all nodes need the same options and files"
            )

    ranks.run_or_abort_all(compare)


def run_command(main: Callable[[], None]) -> None:
    """Run a command's ``main`` and turn a UserError into its one line.

    Whatever the terminal's encoding, text is printed; where standard output is closed before the end
    (``| head -1``) the command does its work without printing.
    """
    if sys.stderr is None:  # closed (2>&-); the next file to be opened would get its number
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    outlets = [_replace_stream(name) for name in ("stdout", "stderr")]
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
        lost = outlets[0] and outlets[0].lost
        if lost and lost.errno != errno.EPIPE:  # else its reader left
            raise UserError(f"standard output cannot be written ({lost.strerror})")
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
