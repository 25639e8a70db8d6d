"""Run commands with --dry-run in this process, and write small placeholders for their outputs."""

import json
from argparse import Namespace

import numpy as np
import torch
from test_documentation import module_and_options

import eval_fid
import sample
from models import zoo_entry
from models.zoo.loading import build_model
from scripts import extract_codes

METRICS = dict.fromkeys(("fid", "is", "sfid", "precision", "recall"), 1.5)


def rehearse(line: str) -> None:
    """Run a command line such as "torchrun --standalone sample.py ..." with --dry-run.

    Write a placeholder for its output, so that later commands can read it. Errors of the command propagate.
    """
    module, options = module_and_options(line)
    module.main([*options, "--dry-run"])
    args = module.make_parser().parse_args(options)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    writers = {sample: write_samples, eval_fid: write_results, extract_codes: write_codes}
    writers.get(module, write_run)(args)


def write_samples(args: Namespace) -> None:
    np.savez(args.output, arr_0=np.zeros((24, 256, 256, 3), np.uint8), arr_1=np.arange(24))
    record = {"format": 1, "kind": "samples", "options": {}, "images_per_second": 2.0}
    args.output.with_suffix(".json").write_text(json.dumps(record))


def write_results(args: Namespace) -> None:
    args.output.write_text(json.dumps({"metrics": METRICS}))


def write_codes(args: Namespace) -> None:
    model = build_model(args.model)
    args.output.mkdir()
    np.save(args.output / "codes.npy", np.zeros((300, 1, model.sequence_length), np.uint16))
    np.save(args.output / "labels.npy", np.arange(300) % model.num_classes)
    (args.output / "header.json").write_text(json.dumps({"vocab_size": model.vocab_size}))


def write_run(args: Namespace) -> None:
    record = {"format": 1, "kind": "a run", "options": {"model": args.model}}
    args.output.mkdir(exist_ok=True)  # the codes may already be in it
    (args.output / "config.json").write_text(json.dumps(record))
    torch.save({"a": torch.zeros(1)}, args.output / zoo_entry(args.model).backbone.checkpoint_name)
