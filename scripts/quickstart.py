"""The main job on the bundled data, for both backbones; scripts/quickstart.sh runs it.

CCA from the bundled base; samples of the base without guidance, of the base with guidance (scale
swept, best taken) and of CCA without guidance; evaluation; a report. With --control also plain
maximum likelihood for the same images and steps, and base samples at lower temperature.

    torchrun --standalone --nproc_per_node 2 -m scripts.quickstart --seed 0
"""

import json
import platform
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import eval_fid
import sample
import train_llamagen_cca
import train_var_cca
from cca.distributed import Processes
from cca.sampling.sampler import SampleRequest, sample_images
from models import SamplingOptions, load_model
from models.errors import run_command
from models.files import write_json
from models.llamagen import LlamaGen
from models.loading import zoo_entry
from models.options import Parser, count
from models.var import VAR
from scripts import extract_codes
from scripts.quickstart_report import write_report

TRAIN, REFERENCE = "assets/fashion-mnist-train-10k.npz", "assets/fashion-mnist-test-10k.npz"
SCALES = {"llamagen-mini": (1.25, 1.5, 1.75, 2.0), "var-mini": (2.0, 2.5, 3.0, 3.5)}
TRAINING = {VAR: train_var_cca, LlamaGen: train_llamagen_cca}
TEMPERATURES = (0.7, 0.8, 0.9)
BATCH_SIZE = 128  # of sampling and of its timing
TIMED_IMAGES, TIMED_ROUNDS = 256, 3


class Quickstart:
    def __init__(self, output: Path, seed: int, samples: int, processes: Processes):
        self.output, self.seed, self.samples, self.processes = output, seed, samples, processes
        self.evaluations: list[tuple[str, list[str]]] = []

    def run(self, module, arguments: list[str]) -> None:
        """Run one of the commands in this process, after showing it."""
        if self.processes.main:
            name = module.__name__ if "." not in module.__name__ else f"-m {module.__name__}"
            print(
                f"\n$ python {name if name.startswith('-m') else name + '.py'} {shlex.join(arguments)}",
                flush=True,
            )
        module.main(arguments)
        self.processes.barrier()

    def train(self, model: str, loss: str) -> str:
        """Fine-tune one model; returns the path of its weights."""
        folder = self.output / f"{model}-{loss}"
        common = ["--model", model, "--loss", loss, "--seed", str(self.seed), "--output", str(folder)]
        backbone, codes = zoo_entry(model).backbone, self.output / "codes"
        if backbone.trains_on_codes and not (codes / "header.json").exists():
            self.run(extract_codes, ["--model", model, "--data", TRAIN, "--output", str(codes)])
        data = ["--codes", str(codes)] if backbone.trains_on_codes else ["--data", TRAIN]
        self.run(TRAINING[backbone], [*common, *data])
        return str(folder / backbone.checkpoint_name)

    def sample(self, model: str, tag: str, *options: str) -> str:
        """Sample one file and queue its evaluation; returns its name."""
        name = f"{model}-{tag}"
        path = self.output / "samples" / f"{name}.npz"
        fixed = [
            "--model", model,
            "--num-samples", str(self.samples),
            "--batch-size", str(BATCH_SIZE),
            "--seed", str(self.seed),
            "--output", str(path),
        ]  # fmt: skip
        self.run(sample, [*fixed, *options])
        result = self.output / "results" / f"{name}.json"
        evaluation = ["--samples", str(path), "--reference", REFERENCE, "--features", "mini"]
        self.evaluations.append((name, [*evaluation, "--output", str(result)]))
        return name

    def evaluate(self) -> dict[str, dict]:
        """Evaluate everything queued; metrics by name."""
        for _, arguments in self.evaluations:
            self.run(eval_fid, arguments)
        return {name: json.loads(Path(a[-1]).read_text())["metrics"] for name, a in self.evaluations}

    def seconds_per_image(self, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds per image of each run, taken in turn by one process with all threads."""
        found: dict[str, list[float]] = {name: [] for name in runs}
        if self.processes.main:
            threads = torch.get_num_threads()
            torch.set_num_threads(threads * self.processes.world)
            for _ in range(1 + TIMED_ROUNDS):
                for name, run in runs.items():
                    began = time.perf_counter()
                    run()
                    found[name].append((time.perf_counter() - began) / TIMED_IMAGES)
            torch.set_num_threads(threads)
        self.processes.barrier()
        # The first round warms up.
        return {name: statistics.median(values[1:]) for name, values in found.items() if values}


def timed_run(
    model: str, weights: str, cfg_scale: float, seed: int, device: torch.device
) -> Callable[[], object]:
    """A call that samples TIMED_IMAGES images as the sampling before did."""
    loaded = load_model(model, weights).to(device)
    options = SamplingOptions(cfg_scale, loaded.default_cfg_schedule)
    request = SampleRequest(
        TIMED_IMAGES, tuple(range(loaded.num_classes)), "balanced", seed, None, "float32", options
    )

    return lambda: sample_images(loaded, range(TIMED_IMAGES), request, BATCH_SIZE, device)


def run_backbone(job: Quickstart, model: str, control: bool) -> dict:
    """Everything for one model; its part of summary.json."""
    weights = {"base": "base", "cca": job.train(model, "cca")}
    if control:
        weights["sft"] = job.train(model, "sft")
    names = {kind: job.sample(model, kind, "--weights", path) for kind, path in weights.items()}
    guided = {s: job.sample(model, f"base-cfg{s}", "--cfg-scale", str(s)) for s in SCALES[model]}
    cooler = {t: job.sample(model, f"base-t{t}", "--temperature", str(t)) for t in TEMPERATURES if control}
    metrics = job.evaluate()
    best = min(guided, key=lambda s: metrics[guided[s]]["fid"])
    runs = {
        kind: timed_run(model, path, 1.0, job.seed, job.processes.device) for kind, path in weights.items()
    }
    runs["base_cfg"] = timed_run(model, "base", best, job.seed, job.processes.device)
    seconds = job.seconds_per_image(runs)
    result = {kind: {**metrics[name], "seconds_per_image": seconds.get(kind)} for kind, name in names.items()}
    result["base_cfg"] = {
        **metrics[guided[best]],
        "seconds_per_image": seconds.get("base_cfg"),
        "cfg_scale": best,
    }
    result["sweep"] = {str(s): metrics[name] for s, name in guided.items()}
    if control:
        result["temperature"] = {str(t): metrics[name] for t, name in cooler.items()}
    return result


def processor() -> str:
    """What the machine calls its CPU, or its first GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    began = time.perf_counter()
    parser = Parser(__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/quickstart"),
        help="folder of the report (default %(default)s)",
    )
    parser.add_argument("--seed", type=count(0), default=0, help="seed of training and sampling (default 0)")
    parser.add_argument(
        "--samples", type=count(100), default=2500, help="images of each sample file (default 2500)"
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="also the controls: plain maximum likelihood, lower temperatures",
    )
    args = parser.parse_args()
    processes = Processes()
    job = Quickstart(args.output, args.seed, args.samples, processes)
    summary = {model: run_backbone(job, model, args.control) for model in ("llamagen-mini", "var-mini")}
    if processes.main:
        summary |= {
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
