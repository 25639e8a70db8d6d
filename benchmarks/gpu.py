"""Sampling, training, decoding and encoding of the full-size models on one GPU, in under ten minutes.

    python -m benchmarks.gpu                              # all rows, into results/gpu.md
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --only sample-var-d16-free-eager --only decode-var-256

Weights are random, so nothing is downloaded. Rows are written one by one: a run that is cut off keeps
what it has, and a row that is run again replaces the old one. Each row may take its share of
--minutes and what earlier ones left; one that fails or takes longer says so, and the next goes on.
Times are medians after a warm-up, waits for the GPU included; compiling has a column of its own:
seconds by which the first run was longer, while --jobs rows did so at once. The
shares are of what this very card allows (benchmarks/limits.py) with its bandwidth and its bfloat16
products, which are measured first. The last column is the run, told above the table.
"""

import datetime
import gc
import multiprocessing
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config

from benchmarks.gpu_rows import KINDS, Prepared, Row, rows
from benchmarks.limits import Card, measure_card, synchronise
from benchmarks.report import Report
from benchmarks.train_step import peak_and_base, reset_peak
from models import UserError
from models.errors import run_command
from models.options import Parser, count, number

TITLE = """# On a GPU

Written by `python -m benchmarks.gpu`, which says what the columns mean."""
COLUMNS = (
    "row", "images at once", "images/s", "peak memory, GB", "share of the limit by bytes",
    "by FLOPs", "compiling, s",
)  # fmt: skip
LONGEST_MEASURED = 3.0  # seconds of timed rounds in a row
PATIENCE = 2.5  # a row may take so many times its even share of the time that is left
WAITED = 0.6  # of its time a group compiles before those that are ready are measured
COMPILERS = 4  # processes that compile for a row: by default each would start one for every core


def timed(run: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    began = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - began


def prepared(row: Row, device: torch.device) -> tuple[Prepared, float]:
    """A row ready to be timed, and seconds of its first run, which picks kernels, gets memory, compiles."""
    gc.collect()  # what is left of the row before
    torch.cuda.empty_cache()  # other processes need it
    torch.manual_seed(0)
    found = KINDS[row.kind](row, device)
    return found, timed(found.run, device)


def measure(
    row: Row, ready: Prepared, first: float, device: torch.device, card: Card, allowed: float
) -> list[str]:
    """The cells of a row; ``allowed``: seconds it should take."""
    reset_peak()
    began = time.perf_counter()
    seconds = [timed(ready.run, device)]
    end = began + min(allowed, LONGEST_MEASURED)
    while len(seconds) < row.rounds and time.perf_counter() + seconds[-1] < end:
        seconds.append(timed(ready.run, device))
    median = statistics.median(seconds)
    by_bytes, by_flops = card.shares(ready.work, median)
    return [
        str(row.images),
        f"{ready.images / median:.4g}",
        f"{peak_and_base()[0] / 1e9:.2f}",
        f"{by_bytes:.1%}",
        f"{by_flops:.1%}",
        f"{first - median:.1f}" if row.compiled else "",
    ]


def work_through(connection: Connection, card: Card | None) -> None:
    """The child process: rows in, each measured when told so; the card, unless given, is measured first."""
    config.compile_threads = COMPILERS
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = card or measure_card(device)
    connection.send(card)
    while (row := connection.recv()) is not None:
        try:
            ready, first = prepared(row, device)
            connection.send(None)
            connection.send(measure(row, ready, first, device, card, connection.recv()))
            del ready
        except Exception as error:  # whatever a row raises is its result
            message = " ".join(str(error).split()).replace("|", "/")[:160]
            connection.send(f"{type(error).__name__}: {message}")


class Worker:
    """A child process, so that an error of the GPU, or a row that takes too long, ends with it.

    Raises UserError where it cannot even measure the card.
    """

    def __init__(self, card: Card | None = None):
        self.connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=work_through, args=(theirs, card), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.card: Card = self.connection.recv()
        except EOFError:
            raise UserError("the rows cannot be run: measuring the device failed, as said above") from None

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def prepare(self, row: Row) -> None:
        """Begin a row; ``ready`` waits until it can be measured."""
        self.connection.send(row)

    def has_answered(self, end: float) -> bool:
        """Whether something has been sent until then (``time.monotonic``)."""
        return self.connection.poll(max(end - time.monotonic(), 0))

    def ready(self, end: float) -> str | None:
        """Why there will be nothing to measure (then the process has ended), or None; see ``answer``."""
        return self.answer(end)

    def measured(self, end: float) -> list[str] | str:
        """The cells of a row, or why there are none; then the process has ended."""
        self.connection.send(max(end - time.monotonic(), 0))
        return self.answer(end + LONGEST_MEASURED)

    def answer(self, end: float) -> Any:
        """What the process sends until then (``time.monotonic``)."""
        try:
            if not self.has_answered(end):
                self.end()
                return "took more than its time"
            result = self.connection.recv()
        except EOFError:
            self.process.join()
            return f"the process ended with status {self.process.exitcode}"
        if isinstance(result, str):
            self.end()
        return result

    def end(self) -> None:
        """At once, whatever it does."""
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        """Let it end by itself."""
        if self.alive:
            self.connection.send(None)
            self.process.join(timeout=20)
        self.end()


def driver() -> str:
    """The GPU driver's version, as far as it can be known."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def machine() -> str:
    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return f"{torch.cuda.get_device_name()}, driver {driver()}, torch {torch.__version__}"


def note(card: Card, argv: list[str] | None) -> str:
    command = shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)])
    kind = "bfloat16" if torch.cuda.is_available() else "float32"
    return (
        f"{datetime.date.today()}, `{command}`. Measured: {card.bandwidth / 1e12:.3g} TB/s in copying, "
        f"{card.rate / 1e12:.3g} TFLOP/s in {kind} products."
    )


def chosen(names: list[str] | None, small: bool) -> list[Row]:
    """The rows of --only, or all. Raises UserError."""
    known = {row.name: row for row in rows(small)}
    for name in names or ():
        if name not in known:
            raise UserError(f"--only: no row is called {name!r}; --list names them")
    return [row for name, row in known.items() if not names or name in names]


def in_groups(todo: list[Row], jobs: int) -> list[list[Row]]:
    """Rows that are prepared at once, ``jobs`` at most: those that compile; others are alone."""
    groups: list[list[Row]] = []
    for row in todo:
        if row.compiled and groups and groups[-1][0].compiled and len(groups[-1]) < jobs:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def run(group: list[Row], workers: list[Worker], card: Card, end: float) -> Iterator[tuple[Row, list[str]]]:
    """Prepare the rows of a group side by side, then measure one after the other; their cells.

    workers: those that wait for work; whoever can work again is left there.
    """
    working = []
    for row in group:
        worker = workers.pop() if workers else Worker(card)
        worker.prepare(row)
        working.append((row, worker))
    # What compiles for long is left to, and the others are measured meanwhile.
    now = time.monotonic()
    soon = now + (end - now) * (1 if len(group) == 1 else WAITED)
    late = [pair for pair in working if not pair[1].has_answered(soon)]
    for row, worker in [*(pair for pair in working if pair not in late), *late]:
        result = worker.ready(end) or worker.measured(end)
        yield row, [str(row.images), f"failed: {result}"] if isinstance(result, str) else result
        if row.compiled:
            worker.close()  # CUDA graphs keep their memory
        elif worker.alive:
            workers.append(worker)


def make_parser() -> Parser:
    parser = Parser(__doc__, "benchmarks.gpu")
    add = parser.add_argument
    add("--only", action="append", metavar="ROW", help="this row alone; may be given several times")
    add("--list", action="store_true", help="print the names of the rows")
    add("--output", type=Path, default=Path("results/gpu.md"), metavar="FILE", help="default %(default)s")
    add("--minutes", type=number(0.1), default=9.5, help="for all rows together (default %(default)s)")
    add(
        "--jobs", type=count(), default=4,
        help="rows that are compiled at once (default %(default)s, for 80 GB)",
    )  # fmt: skip
    add("--small", action="store_true", help="the bundled mini models, to try the command; also on a CPU")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    todo = chosen(args.only, args.small)
    if args.list:
        print("\n".join(row.name for row in todo))
        return
    if not args.small and not torch.cuda.is_available():
        raise UserError("--small: there is no GPU; without one the mini models alone are measured")
    end, workers = time.monotonic() + 60 * args.minutes, [Worker()]
    card, groups = workers[0].card, in_groups(todo, args.jobs)
    report = Report(args.output, TITLE, machine(), note(card, argv), COLUMNS)
    for place, group in enumerate(groups):
        left = end - time.monotonic()
        rows_left = sum(map(len, groups[place:]))
        allowed = min(left, PATIENCE * left * len(group) / rows_left)
        late = ((row, [str(row.images), "failed: no time was left"]) for row in group)
        for row, cells in run(group, workers, card, time.monotonic() + allowed) if allowed > 0 else late:
            report.put(row.name, cells)
            print(f"{row.name}: {', '.join(filter(None, cells))}", flush=True)
    for worker in workers:
        worker.close()


if __name__ == "__main__":
    run_command(main)
