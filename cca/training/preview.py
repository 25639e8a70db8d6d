"""Sample grids that a run writes while it trains (--sample-every)."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cca.config import SampleRequest
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


def grid_drawer(
    trainer: Trainer, folder: Path, every: int, folders: Mapping[str, int] | None = None
) -> Callable[[int], None]:
    """Return a function of the step that writes a grid of samples at multiples of ``every`` (0: never).

    The samples are without guidance, from the same random numbers each time. The columns are classes of
    ``folders`` (class folder -> class); without folders, classes of the model.
    """
    model, ranks = trainer.model, trainer.ranks
    trained = sorted(set(folders.values())) if folders else range(model.num_classes)
    columns = min(GRID_COLUMNS, len(trained))
    classes = tuple(trained[int(i)] for i in torch.linspace(0, len(trained) - 1, columns).long())
    images = GRID_ROWS * columns
    request = SampleRequest(images, classes, "balanced", 0, None, trainer.config.dtype, SamplingOptions())
    too_many = (
        f"--sample-every: {images} images do not fit in GPU memory while training; "
        "use a smaller --micro-batch-size"
    )

    def sample_grid(path: Path) -> None:
        with oom_as_user_error(too_many), training_paused(trainer):
            pieces = list(Sampler(model, request, images, ranks.device).samples([range(images)]))
        with writing(folder):
            folder.mkdir(exist_ok=True)
        write_grid(np.concatenate([piece.images for piece in pieces]), path, columns)

    def draw(step: int) -> None:
        if not every or step % every:
            return
        if ranks.is_main:
            try:
                sample_grid(folder / f"step-{step:06d}.png")
            except UserError as error:  # a missing picture must not end the run
                tqdm.write(f"warning: no sample grid at step {step}: {error}", file=sys.stderr)
        ranks.barrier()

    return draw
