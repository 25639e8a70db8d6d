"""Sampling into a file: batches of tokens, parts of images, then one .npz and its description."""

import json
import time
from collections import deque
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cca.distributed import Processes, StopRequest
from cca.sampling.compiled import CompiledGenerate
from cca.sampling.parts import PartStore
from cca.sampling.sampler import (
    Generate,
    SampleRequest,
    class_of,
    decode_tokens,
    eager_generate,
    prepare,
    sample_tokens,
)
from models import ARImageModel
from models.devices import DOES_NOT_FIT, TOO_MANY_IMAGES, memory_named


def open_store(
    model: ARImageModel, request: SampleRequest, output: Path, provenance: dict, compile: bool
) -> PartStore:
    """Where the samples of a run go, with the options it is known by; nothing is written yet."""
    options = {
        **{k: v for k, v in asdict(request).items() if k != "sampling"},
        **asdict(request.sampling),
        **provenance,
        "compile": compile,
    }
    options = json.loads(json.dumps(options))  # as it reads back: tuples become lists
    size = request.eval_size or model.image_size
    return PartStore(output, options, (request.num_samples, size, size, 3))


def run_sampling(
    model: ARImageModel,
    request: SampleRequest,
    batch_size: int,
    output: Path,
    provenance: dict,
    processes: Processes,
    compile: bool = False,
    command: str | None = None,
) -> bool:
    """Sample, store, assemble ``output`` (.npz) and write its ``.json`` beside it; one line if it is there.

    compile: decode with ``CompiledGenerate``, on a GPU with a compiled tokenizer too.
    command: the command line, for the description.

    Returns False where a signal stopped it: what is stored is taken by the same command. Leaves the
    model's matrices in ``request.dtype``. Raises UserError; see ``PartStore.open``.
    """
    store = open_store(model, request, output, provenance, compile)
    finished = False

    def claim() -> None:
        nonlocal finished
        finished = store.open()

    with processes.holding(output, store.options), StopRequest() as stop:
        processes.agree(claim, main=True)
        if processes.any(finished):
            if processes.main:
                print(f"{output} is finished already, with these options; nothing is left to do")
            return True
        try:
            return _fill(store, model, request, batch_size, processes, stop, command)
        finally:
            if processes.main:
                store.leave()


def _prepared(
    store: PartStore, model: ARImageModel, request: SampleRequest, batch_size: int, device: torch.device
) -> tuple[Generate, str, str]:
    """The model is put on the device: how tokens are made, and what to say where these, or the decoder's
    images, do not fit. Raises UserError where the model does not."""
    name, compile = store.options["model"], store.options["compile"]
    with memory_named(f"--model: {name} {DOES_NOT_FIT}"):
        prepare(model, request.dtype, device, compile)
    too_many = f"--batch-size: {batch_size} {TOO_MANY_IMAGES}"
    # Beside the decoder lie the caches of a compiled batch, or nothing but the model.
    too_large = too_many if compile else f"--model: decoding images of {name} {DOES_NOT_FIT}"
    if not compile:
        return eager_generate(model, request), too_many, too_large
    with memory_named(too_many):
        generate = CompiledGenerate(model, request.sampling, request.dtype, batch_size, device)
    return generate, too_many, too_large


def _fill(
    store: PartStore,
    model: ARImageModel,
    request: SampleRequest,
    batch_size: int,
    processes: Processes,
    stop: StopRequest,
    command: str | None,
) -> bool:
    """Sample the missing parts of a claimed store, and assemble it; False if a signal came first."""
    started, compile = time.perf_counter(), store.options["compile"]
    device, ready = processes.device, []
    processes.agree(lambda: ready.append(_prepared(store, model, request, batch_size, device)))
    ((generate, too_many, too_large),) = ready
    # One process looks, before any writes: on other nodes, a file that is there may not be seen yet.
    missing = processes.look_once(lambda: [part.start for part in store.parts() if not store.made(part)])
    mine = [store.part(start) for start in missing[processes.rank :: processes.world]]
    indices, parts = chain.from_iterable(mine), deque(mine)
    tokens: list[Tensor] = []  # of the parts to come, from the first one's beginning
    made, began = 0, time.perf_counter()
    with tqdm(
        total=sum(map(len, mine)),
        desc=f"sampling {store.output.name}",
        unit="image",
        disable=not processes.main,
    ) as bar:

        def make_next() -> None:
            """One batch of tokens, and the parts that it completes."""
            nonlocal tokens, made
            batch = list(islice(indices, batch_size))
            if not batch:
                return
            first, before = compile and not (made or tokens), time.perf_counter()
            if first:
                bar.set_postfix_str("compiling")
            with memory_named(too_many):
                tokens.append(sample_tokens(model, batch, request, device, generate))
            if stop.asked:
                return  # a part of a part is not kept
            if first:
                bar.set_postfix_str(f"first batch {time.perf_counter() - before:.0f} s")
            bar.update(len(batch))
            while parts and sum(map(len, tokens)) >= len(parts[0]):
                part, drawn = parts.popleft(), torch.cat(tokens)
                with memory_named(too_large):
                    images = decode_tokens(model, drawn[: len(part)], request)
                store.write(part, images.numpy())
                tokens = [drawn[len(part) :]]
                made += len(part)

        # Signals reach the processes at different moments, and one may have a part more than another.
        while processes.any(bool(parts)) and not processes.any(stop.asked):
            processes.agree(make_next)
        stopped = processes.any(stop.asked)
    seconds = time.perf_counter() - began
    images, all_seconds = processes.total(made, seconds)
    if stopped:
        if processes.main:
            print(
                f"stopped; {store.stored()} of {request.num_samples} images are stored, "
                "the same command goes on from there"
            )
        return False
    report = {
        "command": command,
        "options": store.options,
        "batch_size": batch_size,
        "processes": processes.world,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "images_made_by_this_run": int(images),
        "images_per_second": images / (all_seconds / processes.world) if images else None,
        "wall_seconds": time.perf_counter() - started,
    }
    labels = (np.array([class_of(i, request) for i in part], np.int64) for part in store.parts())
    processes.agree(lambda: store.assemble(labels, report), main=True)
    return True
