"""The training loop of both backbones: optimizer steps, metrics, checkpoints, stop signals."""

import time
from functools import partial

from cca.distributed import StopRequest
from cca.progress import ProgressBar
from cca.training.loader import Loader
from cca.training.memory import peak_rate, step_flops
from cca.training.preview import write_preview
from cca.training.run_folder import RunFolder
from cca.training.trainer import Trainer


def train(
    trainer: Trainer,
    loader: Loader,
    folder: RunFolder,
    save_every: int,
    log_every: int,
    sample_every: int = 0,
) -> bool:
    """Train or resume up to ``max_steps``; write metrics, checkpoints and the model to ``folder``.

    ``save_every``, ``log_every`` and ``sample_every`` are the options of these names. Return False if a stop
    signal came first.
    """
    config, ranks, unreadable = trainer.config, trainer.ranks, loader.unreadable
    peak = peak_rate(ranks.device)
    with StopRequest() as request:
        done = folder.resume(trainer)
        title = f"{config.loss} {folder.path.name}"
        with ProgressBar(total=config.max_steps, initial=done, desc=title, disable=not ranks.is_main) as bar:
            began = time.perf_counter()
            for batch in loader.batches(done):
                metrics = trainer.optimizer_step(done, batch)
                seconds = time.perf_counter() - began
                metrics["images_per_second"] = config.batch_size / seconds
                if peak:
                    metrics["mfu"] = step_flops(trainer, batch) / seconds / peak
                done += 1
                if ranks.is_main:
                    show(bar, metrics, done % log_every == 0)
                # A signal reaches the ranks at different moments; they agree on the step to stop at.
                stop, new = ranks.run_or_abort_all(
                    partial(folder.log, done, metrics), True, request.is_requested, len(unreadable.new)
                )
                if new:
                    unreadable.share()
                if stop or unreadable.too_many or done % save_every == 0 or done == config.max_steps:
                    folder.save(trainer, done, unreadable.noted)
                unreadable.check()
                if sample_every and done % sample_every == 0:
                    write_preview(trainer, loader.data, folder.path / "samples" / f"step-{done:06d}.png")
                if stop:
                    break
                began = time.perf_counter()
        if done == config.max_steps:
            folder.export(trainer)
        elif ranks.is_main:
            print(f"stopped after step {done}, checkpoint saved; run the same command again to resume")
    return done == config.max_steps


def show(bar: ProgressBar, metrics: dict[str, float], refresh: bool) -> None:
    """Advance the progress bar by one step; with ``refresh``, show the step's metrics beside it."""
    if refresh:
        names = ["loss", "rewards/accuracies", "rewards/margins", "images_per_second", "mfu"]
        names += ["skipped_steps"] if metrics["skipped_steps"] else []
        values = {name: f"{metrics[name]:.4g}" for name in names if name in metrics}
        bar.set_postfix(values, refresh=False)
    bar.update()
