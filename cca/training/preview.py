"""Sample grids that a run writes while it trains (--sample-every)."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cca.config import SampleRequest
from cca.data.datasets import LabelledDataset
from cca.sampling.grid import write_grid
from cca.sampling.sampler import Sampler
from cca.training.trainer import Trainer
from models import SamplingOptions, UserError
from models.utils.files import writing
from models.utils.precision import oom_as_user_error

GRID_ROWS, GRID_COLUMNS = 4, 10


@contextmanager
def training_paused(trainer: Trainer) -> Iterator[None]:
    """Context manager for evaluation mode, without compiled blocks and deterministic algorithms."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    trainer.model.eval()
    torch.use_deterministic_algorithms(False)  # some operators of sampling have no deterministic kernel
    try:
        with torch.compiler.set_stance("force_eager"):  # else the blocks are compiled again for other shapes
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        trainer.net.train()


def write_preview(trainer: Trainer, data: LabelledDataset, path: Path) -> None:
    """Write a grid of samples without guidance, from the same random numbers each time; only rank 0 does.

    The columns are classes of ``data``. A grid that cannot be made gives a warning and does not end the run.
    """
    model = trainer.model
    if not trainer.ranks.is_main:
        return
    trained = data.occurring_classes() or range(model.num_classes)
    columns = min(GRID_COLUMNS, len(trained))
    classes = tuple(trained[int(i)] for i in torch.linspace(0, len(trained) - 1, columns).long())
    images = GRID_ROWS * columns
    request = SampleRequest(images, classes, "balanced", 0, None, trainer.config.dtype, SamplingOptions())
    too_many = (
        f"--sample-every: {images} images do not fit in GPU memory while training; "
        "use a smaller --micro-batch-size"
    )
    try:
        with oom_as_user_error(too_many), training_paused(trainer):
            pieces = list(Sampler(model, request, images, trainer.ranks.device).images([range(images)]))
        with writing(path.parent):
            path.parent.mkdir(exist_ok=True)
        write_grid(np.concatenate(pieces), path, columns)
    except UserError as error:
        tqdm.write(f"warning: no sample grid {path.name}: {error}", file=sys.stderr)
