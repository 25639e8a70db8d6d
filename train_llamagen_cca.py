"""Fine-tune LlamaGen with Condition Contrastive Alignment (arXiv 2410.09347).

    python -m scripts.extract_codes --model llamagen-mini \\
        --data assets/fashion-mnist-train-10k.npz --output runs/codes
    python train_llamagen_cca.py --model llamagen-mini --codes runs/codes --output runs/llamagen-mini-cca
    torchrun --nproc_per_node 2 train_llamagen_cca.py --model llamagen-mini --codes ... --output ...

Writes DIR/model.pt in the published format, config.json, metrics.jsonl, curves.png, tensorboard/ and
the checkpoints in state/. Run the same command again to resume from the last checkpoint.
"""

from cca.cli.main import run_command
from cca.cli.parser import Parser
from cca.data.codes import Codes
from cca.training.options import training_parser
from cca.training.setup import run_training


def make_parser() -> Parser:
    return training_parser(
        __doc__,
        "train_llamagen_cca",
        "--codes",
        "folder of codes: written by scripts/extract_codes.py, "
        "or the published one with imagenet384_codes and imagenet384_labels",
    )


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    run_training(args, args.codes, Codes)


if __name__ == "__main__":
    run_command(main)
