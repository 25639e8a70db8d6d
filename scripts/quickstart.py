"""The main job on the bundled data, for both backbones; scripts/quickstart.sh runs it.

CCA from the bundled base; samples of the base without guidance, of the base with guidance (scale
swept, best taken) and of CCA without guidance; evaluation; a report. With --control also plain
maximum likelihood for the same images and steps, and base samples at lower temperature.

    torchrun --standalone --nproc_per_node 2 -m scripts.quickstart --seed 0
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from models.outputs import check_output

from cca.distributed import Processes
from cca.sampling.sampler import SampleRequest, sample_images
from models import SamplingOptions, load_model
from models.errors import run_command
from models.files import write_json
from models.options import Parser, count
from scripts.experiments import (
    BUNDLED_REFERENCE,
    BUNDLED_TRAIN,
    CCA,
    CONTROL,
    MINI,
    base_row,
    guided_rows,
    trained_row,
)
from scripts.pipeline import InProcess, Pipeline, Row
from scripts.quickstart_report import write_report
from scripts.report import processor

TEMPERATURES = (0.8,)
BATCH_SIZE = 128  # of sampling and of its timing
TIMED_IMAGES, TIMED_ROUNDS = 512, 3


def seconds_per_image(runs: dict[str, Callable[[], object]], processes: Processes) -> dict[str, float]:
    """Median seconds per image of each run, taken in turn by one process with all threads."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    if processes.main:
        threads = torch.get_num_threads()
        torch.set_num_threads(threads * processes.world)
        for _ in range(1 + TIMED_ROUNDS):
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                found[name].append((time.perf_counter() - began) / TIMED_IMAGES)
        torch.set_num_threads(threads)
    processes.barrier()
    return {
        name: statistics.median(values[1:]) for name, values in found.items() if values
    }  # the first warms up


def timed_run(
    model: str, weights: str, cfg_scale: float, seed: int, device: torch.device
) -> Callable[[], object]:
    """A call that samples TIMED_IMAGES images as the sampling before did."""
    loaded = load_model(model, weights).to(device)
    options = SamplingOptions(cfg_scale, loaded.default_cfg_schedule)
    classes = tuple(range(loaded.num_classes))
    request = SampleRequest(TIMED_IMAGES, classes, "balanced", seed, None, "float32", options)
    return lambda: sample_images(loaded, range(TIMED_IMAGES), request, BATCH_SIZE, device)


def run_model(job: Pipeline, processes: Processes, model: str, control: bool) -> dict:
    """Everything for one model; its part of summary.json: figures by kind, and the guidance sweep.

    Rows are named as in scripts/reproduce.py, whose results in the same folder are taken.
    """
    sweep = dict(zip(MINI[model].scales, guided_rows(model)))
    swept = job.run(list(sweep.values()))
    best = min(sweep, key=lambda s: swept[sweep[s].key]["fid"]) if swept else next(iter(sweep))
    rows = {
        "base": base_row(model),
        "guided": replace(sweep[best], label=f"base, best guidance (scale {best:g})"),
        "cca": trained_row(model, CCA, "CCA, no guidance"),
    }
    cooler = []
    if control:
        rows["sft"] = trained_row(model, CONTROL, "control: maximum likelihood, no guidance")
        for value in TEMPERATURES:
            options = ("--temperature", f"{value}")
            cooler.append(
                Row(model, f"base-t{value}", f"control: base at temperature {value}", "base", options)
            )
    figures = job.run([*rows.values(), *cooler])
    if not figures:  # a dry run
        return {}
    scales = {kind: best if kind == "guided" else 1.0 for kind in rows}
    timed = {
        kind: timed_run(model, job.weights(row), scales[kind], job.seed, processes.device)
        for kind, row in rows.items()
    }
    seconds = seconds_per_image(timed, processes)
    main = {
        kind: {
            "label": row.label,
            "file": row.key,
            **figures[row.key],
            "seconds_per_image": seconds.get(kind),
        }
        for kind, row in rows.items()
    }
    return {
        "best_scale": best,
        "main": main,
        "sweep": [{"label": row.label, "scale": s, **swept[row.key]} for s, row in sweep.items()],
        "temperature": [{"label": row.label, **figures[row.key]} for row in cooler],
    }


def main() -> None:
    began = time.perf_counter()
    parser = Parser(__doc__, "scripts.quickstart")
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        default=Path("runs/quickstart"),
        help="folder of the report (default %(default)s)",
    )
    add("--seed", type=count(0), default=0, help="seed of training and sampling (default 0)")
    add(
        "--samples",
        type=count(100),
        default=5000,
        help="images of each row (default 5000)",
    )
    add(
        "--control",
        action="store_true",
        help="also the controls: plain maximum likelihood, lower temperatures",
    )
    add("--dry-run", action="store_true", help="print every command and stop")
    args = parser.parse_args()
    check_output("--output", args.output, folder=True)
    processes = Processes()
    job = Pipeline(
        folder=args.output, shared=args.output, launcher=InProcess(processes, args.dry_run),
        data=BUNDLED_TRAIN, reference=BUNDLED_REFERENCE, features="mini", num_samples=args.samples,
        seed=args.seed, batch_size=BATCH_SIZE,
    )  # fmt: skip
    job.claim()
    models = {model: run_model(job, processes, model, args.control) for model in MINI}
    if processes.main and not args.dry_run:
        summary = {
            "models": models,
            "wall_seconds": time.perf_counter() - began,
            "seed": args.seed,
            "samples": args.samples,
            "threads": torch.get_num_threads() * processes.world,
            "processor": processor(),
            "versions": {"torch": torch.__version__},
        }
        write_json(args.output / "summary.json", summary)
        write_report(args.output, summary)
    processes.barrier()


if __name__ == "__main__":
    run_command(main)
