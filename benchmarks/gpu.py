"""Sampling, training, decoding and encoding of the full-size models on one GPU, in under ten minutes.

    python -m benchmarks.gpu                              # all rows, into results/gpu.md
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --only sample-var-d16-free-eager --only decode-var-256

Weights are random, so nothing is downloaded. Rows are written one by one: a run that is cut off keeps
what it has, and a row that is run again replaces the old one. Each row may take its share of
--minutes and what earlier ones left; one that fails or takes longer says so, and the next goes on. A
compiled VAR, a graph for each level, may need --only and more minutes.
Times are medians after a warm-up, waits for the GPU included; compiling has a column of its own. The
shares are of what this very card allows (benchmarks/limits.py) with its bandwidth and its bfloat16
products, which are measured first.
"""

import datetime
import gc
import multiprocessing
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.gpu_rows import KINDS, Row, rows
from benchmarks.limits import Card, measure_card, synchronise
from benchmarks.report import Report
from benchmarks.train_step import peak_and_base, reset_peak
from models import UserError
from models.errors import run_command
from models.options import Parser, number

TITLE = """# On a GPU

Written by `python -m benchmarks.gpu`, which says what the columns mean."""
COLUMNS = (
    "row", "images at once", "images/s", "peak memory, GB", "share of the limit by bytes",
    "by FLOPs", "compiling, s",
)  # fmt: skip
LONGEST_MEASURED = 5.0  # seconds of timed rounds in a row
PATIENCE = 2.5  # a row may take so many times its even share of the time that is left


def timed(run: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    began = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - began


def measure(row: Row, device: torch.device, card: Card, allowed: float) -> list[str]:
    """The cells of a row; ``allowed``: seconds it should take in all."""
    began = time.perf_counter()
    gc.collect()  # what is left of the row before
    torch.manual_seed(0)
    prepared = KINDS[row.kind](row, device)
    first = timed(prepared.run, device)  # picks kernels, gets memory, compiles
    reset_peak()
    seconds = [timed(prepared.run, device)]
    end = min(began + allowed, time.perf_counter() + LONGEST_MEASURED)
    while len(seconds) < row.rounds and time.perf_counter() + seconds[-1] < end:
        seconds.append(timed(prepared.run, device))
    median = statistics.median(seconds)
    by_bytes, by_flops = card.shares(prepared.work, median)
    return [
        str(row.images),
        f"{prepared.images / median:.4g}",
        f"{peak_and_base()[0] / 1e9:.2f}",
        f"{by_bytes:.1%}",
        f"{by_flops:.1%}",
        f"{first - median:.1f}" if row.compiled else "",
    ]


def work_through(connection: Connection) -> None:
    """The child process: rows in, cells or the reason of a failure out; the card is measured first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = measure_card(device)
    connection.send(card)
    while (task := connection.recv()) is not None:
        row, allowed = task
        try:
            connection.send(measure(row, device, card, allowed))
        except Exception as error:  # whatever a row raises is its result
            message = " ".join(str(error).split()).replace("|", "/")[:160]
            connection.send(f"{type(error).__name__}: {message}")


class Worker:
    """A child process, so that an error of the GPU, or a row that takes too long, ends with it.

    Raises UserError where it cannot even measure the card.
    """

    def __init__(self):
        self.connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=work_through, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.card = self.connection.recv()
        except EOFError:
            raise UserError("the rows cannot be run: measuring the device failed, as said above") from None

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def run(self, row: Row, allowed: float) -> list[str] | str:
        """The cells of a row, or why there are none; then the process has ended."""
        self.connection.send((row, allowed))
        try:
            result = self.connection.recv() if self.connection.poll(allowed) else None
        except EOFError:
            self.process.join()
            return f"the process ended with status {self.process.exitcode}"
        if not isinstance(result, list):
            self.end()
        return result or f"took more than its {allowed:.0f} s"

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


def notes(card: Card, argv: list[str] | None) -> str:
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


def make_parser() -> Parser:
    parser = Parser(__doc__, "benchmarks.gpu")
    add = parser.add_argument
    add("--only", action="append", metavar="ROW", help="this row alone; may be given several times")
    add("--list", action="store_true", help="print the names of the rows")
    add("--output", type=Path, default=Path("results/gpu.md"), metavar="FILE", help="default %(default)s")
    add("--minutes", type=number(0.1), default=9.5, help="for all rows together (default %(default)s)")
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
    end, worker = time.monotonic() + 60 * args.minutes, Worker()
    report = Report(args.output, TITLE, machine(), notes(worker.card, argv), COLUMNS)
    for place, row in enumerate(todo):
        left = end - time.monotonic()
        allowed = min(left, PATIENCE * left / (len(todo) - place))
        result: list[str] | str = "no time was left"
        if allowed > 0:
            worker = worker if worker.alive else Worker()
            result = worker.run(row, allowed)
        cells = [str(row.images), f"failed: {result}"] if isinstance(result, str) else result
        report.put(row.name, cells)
        print(f"{row.name}: {', '.join(filter(None, cells))}", flush=True)
    worker.close()


if __name__ == "__main__":
    run_command(main)
