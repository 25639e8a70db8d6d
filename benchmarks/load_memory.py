"""Peak memory of loading published weights, over the bytes of the weights.

    python -m benchmarks.load_memory --models llamagen-xl var-d30

Makes a file of random weights in the published format, loads it with ``load_model`` in a process
of its own, reads every weight once, and prints the peak of resident memory above what the
imports took. 1.0 is the weights alone.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from cca.errors import run_command
from cca.options import Parser
from models.checkpoints import save_published
from models.zoo import ZOO, build_model, load_model

CHILD = "from benchmarks.load_memory import measure; measure({!r}, {!r}, {!r})"


def random_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a meta-device module, filled without a pass through a random generator."""
    return {k: torch.full(v.shape, 0.01, dtype=v.dtype) if v.is_meta else v for k, v in module.state_dict().items()}


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status (getrusage's peak would count the parent's before exec)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure(name: str, weights: str, tokenizer: str) -> None:
    """Run in a fresh process: load, touch every weight, print the peak as JSON."""
    before = memory("VmRSS")
    model = load_model(name, weights, tokenizer)
    size = sum(p.nbytes for p in model.parameters())
    checksum = sum(p.detach().sum().item() for p in model.parameters())
    print(json.dumps({"weights_bytes": size, "peak_bytes": memory("VmHWM") - before, "checksum": checksum}))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(ZOO), default=["llamagen-xl", "var-d30"], help="models (default %(default)s)")
    args = parser.parse_args()
    print("| model | weights, GB | peak above imports, GB | ratio |\n|---|---|---|---|")
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            weights, tokenizer = Path(folder) / "model.pt", Path(folder) / "tokenizer.pt"
            model = build_model(name)
            save_published(random_state(model.transformer), weights)
            save_published(random_state(model.tokenizer), tokenizer)
            found = json.loads(subprocess.check_output([sys.executable, "-c", CHILD.format(name, str(weights), str(tokenizer))], text=True))
        gb = {k: found[k] / 1e9 for k in ("weights_bytes", "peak_bytes")}
        print(f"| {name} | {gb['weights_bytes']:.2f} | {gb['peak_bytes']:.2f} | {gb['peak_bytes'] / gb['weights_bytes']:.2f} |", flush=True)


if __name__ == "__main__":
    run_command(main)
