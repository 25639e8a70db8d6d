"""Peak memory of loading published weights, over the bytes of the weights.

    python -m benchmarks.load_memory --models llamagen-xl var-d30

Makes files of made-up weights, loads them with ``load_model`` in a process of its own, reads
every weight once, and prints the peak of resident memory above what the imports took, over the
bytes of the loaded weights (float32). 1.0 is the weights alone. Formats: the published one
("pt"), the same in half precision ("pt-half"), and "safetensors".
"""

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from models.errors import run_command
from models.loading import build_model, load_model
from models.options import Parser
from models.tables import markdown_header, markdown_row
from models.weights import save_published, save_safetensors
from models.zoo import ZOO

FORMATS = {
    "pt": (save_published, torch.float32),
    "pt-half": (save_published, torch.float16),
    "safetensors": (save_safetensors, torch.float32),
}
CHILD = "from benchmarks.load_memory import measure; measure({!r}, {!r}, {!r})"


def made_up_state(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor of a meta-device module, filled without a pass through a random generator."""
    return {
        k: torch.full(v.shape, 0.01, dtype=dtype) if v.is_meta else v for k, v in module.state_dict().items()
    }


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
    parser = Parser(__doc__, "benchmarks.load_memory")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=sorted(ZOO),
        default=["llamagen-xl", "var-d30"],
        help="models (default %(default)s)",
    )
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="formats (default all)"
    )
    args = parser.parse_args()
    print(markdown_header(["model", "format", "weights, GB", "peak above imports, GB", "ratio"]))
    for name, form in itertools.product(args.models, args.formats):
        with tempfile.TemporaryDirectory() as folder:
            weights, tokenizer = Path(folder) / "model", Path(folder) / "tokenizer"
            model, (save, dtype) = build_model(name), FORMATS[form]
            for module, path in ((model.transformer, weights), (model.tokenizer, tokenizer)):
                save(made_up_state(module, dtype), path)
            found = json.loads(
                subprocess.check_output(
                    [sys.executable, "-c", CHILD.format(name, str(weights), str(tokenizer))], text=True
                )
            )
        size, peak = found["weights_bytes"] / 1e9, found["peak_bytes"] / 1e9
        print(markdown_row([name, form, f"{size:.2f}", f"{peak:.2f}", f"{peak / size:.2f}"]), flush=True)


if __name__ == "__main__":
    run_command(main)
