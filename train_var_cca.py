"""Fine-tune VAR with Condition Contrastive Alignment (arXiv 2410.09347).

    python train_var_cca.py --model var-mini \\
        --data assets/fashion-mnist-train-10k.npz --output runs/var-mini-cca
    torchrun --nproc_per_node 2 train_var_cca.py --model var-mini --data ... --output ...

Writes DIR/model.pth in the published format, config.json, metrics.jsonl, curves.png, tensorboard/ and
the checkpoints in state/. Run the same command again to resume from the last checkpoint.
"""

from functools import partial

from cca.cli.main import run_command
from cca.cli.parser import Parser
from cca.data.datasets import DATA_HELP, open_labelled_images
from cca.data.image_folders import add_orientation_option, check_orientation_option
from cca.data.labels import add_classes_option, read_classes
from cca.training.options import training_parser
from cca.training.setup import run_training


def make_parser() -> Parser:
    parser = training_parser(__doc__, "train_var_cca", "--data", DATA_HELP)
    add_classes_option(parser.group("data"))
    add_orientation_option(parser.group("data"))
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    check_orientation_option(args, args.data)
    classes = read_classes(args.classes_from)
    open_data = partial(open_labelled_images, classes=classes, upright=args.exif_orientation)
    run_training(args, args.data, open_data)


if __name__ == "__main__":
    run_command(main)
