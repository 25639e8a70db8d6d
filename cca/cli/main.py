"""The order in which every command runs: look at the output, show the plan, lock, work, finish."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from cca.cli.output import Found, Output, options_of
from cca.distributed import Processes
from models.plan import Download, require_space, show_plan


class Job(Protocol):
    """What a command has resolved its options to. Commands need not subclass it."""

    @property
    def downloads(self) -> Sequence[Download]:
        """Files that are fetched where they are not here yet."""
        ...

    def known(self) -> Mapping:
        """Return the options that the output is known by, as far as they are known without network."""
        ...

    def plan(self) -> dict[str, str]:
        """Return what is shown before the work, and raise UserError for what cannot be done."""
        ...

    def prepare(self) -> dict:
        """Get what the work needs, by download where it must; return the content of the marker."""
        ...

    def work(self) -> bool:
        """Make the output, whose lock is held; False where a signal came first."""
        ...


@dataclass
class OnePart:
    """The job of a command that writes one file at once, whatever is there.

    rows: the plan. make: writes the file, on rank 0.
    """

    rows: dict[str, str]
    make: Callable[[], None]
    downloads: Sequence[Download] = ()

    def known(self) -> dict:
        return {}

    def plan(self) -> dict[str, str]:
        return self.rows

    def prepare(self) -> dict:
        return {}

    def work(self) -> bool:
        self.make()
        return True


AnyJob = TypeVar("AnyJob", bound=Job)


def play(
    args: Any, output: Output | None, resolve: Callable[[Any, Processes, Found], AnyJob]
) -> AnyJob | None:
    """Run a command.

    Args:
        args: parsed options, ``dry_run`` among them.
        output: what the command writes; None: nothing.
        resolve: makes the job from the options and from what was found at the output.

    Returns:
        the job, when its output is finished; None after a dry run, or where a signal came first.

    Raises:
        UserError: on the rank that refused; the others end without a word.
    """
    ranks = Processes()
    found = look(ranks, output) if output else Found()
    job = resolve(args, ranks, found)

    def show() -> None:
        finished = {}
        if output:
            output.check(found, job.known())
            finished = {"finished": f"{output.path} is there already, with these options"}
        show_plan(job.plan() | (finished if found.is_finished else {}), job.downloads)

    ranks.agree(show, main=True)
    if args.dry_run:
        return None
    ranks.agree(lambda: require_space(job.downloads))  # all look before the first one downloads
    content = job.prepare()
    if output is None:
        return job if job.work() else None
    with locked(ranks, output, options_of(content)):
        return job if make(ranks, output, content, job) else None


def make(ranks: Processes, output: Output, content: Mapping, job: Job) -> bool:
    """Make an output that is locked, unless it is finished; ``content``: of its marker."""
    found = look(ranks, output)
    ranks.agree(lambda: output.check(found, options_of(content)), main=True)
    if found.is_finished:
        ranks.agree(output.remove_parts, main=True)
        if ranks.main:
            print(f"{output.path} is finished already, with these options; nothing is left to do")
        return True
    try:
        ranks.agree(lambda: output.begin(content), main=True)
        return job.work()
    finally:
        if ranks.main:
            output.leave()


def look(ranks: Processes, output: Output) -> Found:
    """Return what rank 0 finds at the output, on every rank."""
    return Found(**ranks.look_once(lambda: asdict(output.look())))


@contextmanager
def locked(ranks: Processes, output: Output, options: Mapping) -> Iterator[None]:
    """Context manager in which rank 0 holds the output against other runs.

    Raises UserError where the ranks do not make it from the same options and files, or where a rank on
    another machine finds another folder at that path.
    """
    ranks.same(options)
    notes: list[str] = []
    with ExitStack() as stack:
        ranks.agree(lambda: notes.append(stack.enter_context(output.locked())), main=True)
        note = ranks.from_main("".join(notes))
        ranks.agree(lambda: None if ranks.main else output.check_seen(note))
        yield
