"""The training loop of both backbones: data in, optimizer steps, metrics out, saving, stopping."""

import time
from collections.abc import Callable
from functools import partial

from tqdm import tqdm

from cca.data.sources import TokenSource
from cca.distributed import StopRequest
from cca.training.gpu import peak_rate
from cca.training.loader import Unreadable, own_items
from cca.training.losses import LOSSES, Batch, pair_labels
from cca.training.run_folder import RunFolder
from cca.training.schedule import global_batches, unconditional_rows
from cca.training.trainer import Trainer


def train(
    trainer: Trainer,
    data: TokenSource,
    folder: RunFolder,
    save_every: int,
    log_every: int,
    workers: int = 0,
    sample_every: int = 0,
    draw_samples: Callable[[int], None] = lambda step: None,
) -> bool:
    """Run or resume training up to ``max_steps``, then leave model and state in ``folder``.

    Returns False where a signal came first.
    """
    config, processes = trainer.config, trainer.processes
    peak = peak_rate(processes.device)
    with StopRequest() as request:
        done = folder.resume(trainer)
        share, negatives_of = processes.share(config.batch_size), LOSSES[config.loss].negatives
        items, unreadable = own_items(data, config, done, share, workers), Unreadable(data, processes)
        with tqdm(
            total=config.max_steps,
            initial=done,
            desc=f"{config.loss} {folder.path.name}",
            disable=not processes.main,
        ) as bar:
            for epoch, indices in global_batches(len(data), config, done):
                began = time.perf_counter()
                uncond = unconditional_rows(indices, epoch, config)
                labels, negatives = pair_labels(
                    data.labels(indices), uncond, trainer.model.null_class, negatives_of
                )
                views, flags = next(items)
                batch = Batch(data.tokens(views), labels[share], negatives[share], uncond[share])
                metrics = trainer.optimizer_step(done, batch)
                seconds = time.perf_counter() - began
                metrics["images_per_second"] = config.batch_size / seconds
                if peak:
                    metrics["mfu"] = trainer.flops / seconds / peak
                done += 1
                if processes.main:
                    show(bar, metrics, done % log_every == 0)
                # A signal reaches the processes at different moments; they agree on the step to stop at.
                flagged = float(request.asked), float(unreadable.report(flags))
                asked, missing = processes.agree(partial(folder.log, done, metrics), True, *flagged)
                stop = bool(asked)
                unreadable.add(int(missing))
                if stop or done % save_every == 0 or done == config.max_steps:
                    folder.save(trainer, done)
                if sample_every and done % sample_every == 0:
                    draw_samples(done)
                if stop and done < config.max_steps:
                    break
        if done == config.max_steps:
            folder.export(trainer)
        elif processes.main:
            print(f"stopped and saved after step {done}; the same command goes on from there")
    return done == config.max_steps


def show(bar: tqdm, metrics: dict[str, float], refresh: bool) -> None:
    bar.update()
    if refresh:
        shown = (
            "loss",
            "rewards/accuracies",
            "rewards/margins",
            "images_per_second",
            "mfu",
            *(["skipped_steps"] if metrics["skipped_steps"] else []),
        )
        bar.set_postfix({k: f"{metrics[k]:.4g}" for k in shown if k in metrics})
