"""Sample grids that a run draws from itself on its way."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cca.sampling.grid import write_grid
from cca.sampling.sampler import Sampler, SampleRequest
from cca.training.trainer import Trainer
from models import SamplingOptions, UserError
from models.devices import memory_named

GRID_ROWS, GRID_COLUMNS = 4, 10


@contextmanager
def training_paused(trainer: Trainer) -> Iterator[None]:
    """Evaluation mode, without what is set for training: compiled blocks, ``--deterministic``."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    trainer.model.eval()
    torch.use_deterministic_algorithms(False)  # not every operation of sampling has such a kernel
    try:
        with torch.compiler.set_stance("force_eager"):  # else they are compiled anew for other shapes
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        trainer.net.train()


def grid_drawer(
    trainer: Trainer, folder: Path, folders: Mapping[str, int] | None = None
) -> Callable[[int], None]:
    """A function that samples a grid without guidance, always from the same random numbers.

    Its columns are classes of ``folders`` (class folder -> class), or of the model where there are none.
    """
    model, processes = trainer.model, trainer.processes
    trained = sorted(set(folders.values())) if folders else range(model.num_classes)
    columns = min(GRID_COLUMNS, len(trained))
    classes = tuple(trained[int(i)] for i in torch.linspace(0, len(trained) - 1, columns).long())
    request = SampleRequest(
        GRID_ROWS * columns, classes, "balanced", 0, None, trainer.config.dtype, SamplingOptions()
    )
    sampler = Sampler(model, request, request.num_samples, processes.device)
    too_many = (
        f"{request.num_samples} images do not fit in the GPU's memory beside the training; "
        "a smaller --micro-batch-size leaves more of it"
    )

    def draw(step: int) -> None:
        if processes.main:
            try:
                with memory_named(too_many), training_paused(trainer):
                    pieces = list(sampler.samples([range(request.num_samples)]))
                folder.mkdir(exist_ok=True)
                images = np.concatenate([piece.images for piece in pieces])
                write_grid(images, folder / f"step-{step:06d}.png", columns)
            except UserError as error:  # a picture is not worth the run
                tqdm.write(f"no sample grid of step {step}: {error}", file=sys.stderr)
        processes.barrier()

    return draw
