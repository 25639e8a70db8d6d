"""The loop around the training step: data in, metrics out, saving, stopping."""

import signal
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cca.data import TokenSource
from cca.distributed import Processes
from cca.errors import UserError
from cca.losses import pair_labels
from cca.plan import TrainingConfig, global_batches, unconditional_rows
from cca.run_folder import RunFolder
from cca.trainer import Trainer

UNREADABLE_SHARE = 0.001  # of all images; beyond it the run stops


def own_items(
    data: TokenSource, config: TrainingConfig, done: int, share: slice, workers: int
) -> Iterator[list[Tensor]]:
    """This process's part of every global batch from step ``done``: (items, unreadable indices)."""
    options = {
        "pin_memory": torch.cuda.is_available(),
        "multiprocessing_context": "fork" if workers else None,
    }
    batches = [
        [(epoch, int(i)) for i in indices[share]]
        for epoch, indices in global_batches(len(data), config, done)
    ]
    return iter(DataLoader(data, batch_sampler=batches, num_workers=workers, **options))


class Unreadable:
    """Images that could not be read, by path, over all processes."""

    def __init__(self, data: TokenSource, processes: Processes):
        self.data, self.processes = data, processes
        self.own: set[int] = set()
        self.total = 0

    def report(self, flags: Tensor) -> int:
        """Note one batch's unreadable indices (-1: readable); returns how many are new here."""
        new = set(flags[flags >= 0].tolist()) - self.own
        self.own |= new
        for index in new:
            tqdm.write(
                f"unreadable, replaced by another image of its class: {self.data.name(index)}",
                file=sys.stderr,
            )
        return len(new)

    def add(self, count: int) -> None:
        self.total += count
        if self.total > UNREADABLE_SHARE * len(self.data):
            raise UserError(
                f"--data: {self.total} of {len(self.data)} images cannot be read, more than {UNREADABLE_SHARE:.1%}; their paths are above"
            )


def train(
    trainer: Trainer,
    data: TokenSource,
    folder: RunFolder,
    save_every: int,
    log_every: int,
    workers: int = 0,
    sample_every: int = 0,
    draw_samples: Callable[[int], None] = lambda step: None,
) -> None:
    """Run or resume training up to ``max_steps``, then leave model and state in ``folder``."""
    config, processes = trainer.config, trainer.processes
    done = folder.resume(trainer)
    asked = False

    def ask_to_stop(*_) -> None:
        nonlocal asked
        asked = True

    previous = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGTERM, signal.SIGINT)}
    share = processes.share(config.batch_size)
    items, unreadable = own_items(data, config, done, share, workers), Unreadable(data, processes)
    bar = tqdm(
        total=config.max_steps,
        initial=done,
        desc=f"{config.loss} {folder.path.name}",
        disable=not processes.main,
    )
    try:
        for epoch, indices in global_batches(len(data), config, done):
            began = time.perf_counter()
            uncond = unconditional_rows(indices, epoch, config)
            labels, negatives = pair_labels(data.labels(indices), uncond, trainer.model.null_class)
            batch, flags = next(items)
            metrics = trainer.step(done, data.tokens(batch), labels[share], negatives[share], uncond[share])
            metrics["images_per_second"] = config.batch_size / (time.perf_counter() - began)
            done += 1
            if processes.main:
                folder.log(done, metrics)
                show(bar, metrics, done % log_every == 0)
            # A signal reaches the processes at different moments; they agree on the step to stop at.
            agreed = processes.sum(
                torch.tensor([float(asked), float(unreadable.report(flags))], device=processes.device)
            )
            stop = bool(agreed[0])
            unreadable.add(int(agreed[1]))
            if stop or done % save_every == 0 or done == config.max_steps:
                folder.save(trainer, done)
            if sample_every and done % sample_every == 0:
                draw_samples(done)
            if stop and done < config.max_steps:
                if processes.main:
                    bar.close()
                    print(f"stopped and saved after step {done}; the same command goes on from there")
                return
        folder.export(trainer)
    finally:
        bar.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


def show(bar: tqdm, metrics: dict[str, float], refresh: bool) -> None:
    bar.update()
    if refresh:
        shown = (
            "loss",
            "accuracy",
            "margin",
            "images_per_second",
            *(["skipped_steps"] if metrics["skipped_steps"] else []),
        )
        bar.set_postfix({k: f"{metrics[k]:.4g}" for k in shown if k in metrics})
