"""List the model zoo: sizes, published FIDs, and what is on this machine already.

    python -m models
    python -m models --json > models.json

FID-50k on ImageNet as published: base and CCA without guidance, guided at scale s; LlamaGen at
384 pixels, resized to 256. The last columns say where the weights are: "cached" files are in the
cache of huggingface_hub, those on the "hub" are downloaded when first used, "–" were not published.
Sizes are computed from the parameters.

--json prints all that is known instead: every published figure with the sampling settings behind it,
the recipes by loss, and of each weights file repository, address, path on this machine (null where it
is not there) and approximate size in bytes.
"""

import json

from models.catalogue import catalogue, tokenizer_rows, zoo_rows
from models.errors import run_command
from models.options import Parser
from models.tables import aligned_table


def make_parser() -> Parser:
    parser = Parser(__doc__, "models.__main__")
    parser.add_argument("--json", action="store_true", help="everything, as JSON on standard output")
    return parser


def main(argv: list[str] | None = None) -> None:
    if make_parser().parse_args(argv).json:
        print(json.dumps(catalogue(), indent=2, allow_nan=False))
        return
    print(aligned_table(zoo_rows(), left=("model", "base", "cca")))
    print()
    print(aligned_table(tokenizer_rows(), left=("tokenizer", "weights", "models")))
    print("\n" + __doc__.split("\n\n")[2].strip())


if __name__ == "__main__":
    run_command(main)
