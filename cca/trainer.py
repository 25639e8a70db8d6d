"""The trainer of both backbones: reward of policy over reference, one loss, one optimizer step.

Everything random belongs to an image or a step (see ``cca.random``), and negatives are rolled
over the global batch, so neither the micro-batch size nor the number of processes changes what
is trained.
"""

import copy
import json
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cca.data import TokenSource
from cca.distributed import Processes
from cca.errors import UserError
from cca.losses import CONTRASTIVE_LOSSES, diagnostics, pair_labels
from cca.random import DATA_ORDER, DROPOUT, UNCONDITIONAL, stream
from models.base import ARImageModel
from models.checkpoints import atomic_write, save_published

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingConfig:
    """Every option that decides what is trained; see ``--help`` of the commands."""

    loss: str
    beta: float
    lam: float
    uncond_ratio: float
    batch_size: int
    lr: float
    weight_decay: float
    grad_clip: float
    warmup: float
    final_lr: float
    schedule_accumulation: int
    max_steps: int
    seed: int
    dtype: str


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Rate of optimizer step ``step`` (from 0): VAR's linear schedule, constant for final_lr 1.

    lr/peak = wpe + (1 - wpe) * rest / 0.95, at most 1, with rest falling from 1 to 0 after the
    warm-up from 0.005. The published schedule counts micro-batches; a step takes the rate of its
    last one.
    """
    total = config.max_steps * config.schedule_accumulation
    clock = (step + 1) * config.schedule_accumulation - 1
    return config.lr * lr_factor(clock, config.warmup * total, total, config.final_lr)


def lr_factor(clock: int, warm: float, total: int, final: float) -> float:
    """Fraction of the peak rate at one tick of the schedule."""
    if clock < warm:
        return 0.005 + 0.995 * clock / warm
    rest = 1.0 - (clock - warm) / max(total - 1 - warm, 1)
    return final + (1.0 - final) * min(1.0, rest / 0.95)


def make_optimizer(model: ARImageModel, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95); no decay for vectors and the names the backbone exempts."""
    trained = [(k, p) for k, p in model.transformer.named_parameters() if p.requires_grad]
    decays = {k: p.ndim >= 2 and not any(part in k for part in model.no_decay) for k, p in trained}
    groups = [
        {"params": [p for k, p in trained if decays[k]], "weight_decay": config.weight_decay},
        {"params": [p for k, p in trained if not decays[k]], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def global_batches(size: int, config: TrainingConfig, start: int) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, image indices [batch_size]) of every step from ``start``; the rest of an epoch is dropped."""
    per_epoch = size // config.batch_size
    for step in range(start, config.max_steps):
        epoch, position = divmod(step, per_epoch)
        if step == start or position == 0:
            order = stream(config.seed, DATA_ORDER, epoch).permutation(size)
        yield epoch, order[position * config.batch_size : (position + 1) * config.batch_size]


def unconditional_rows(indices: np.ndarray, epoch: int, config: TrainingConfig) -> Tensor:
    """Which images lose their class: drawn per (seed, epoch, image), bool [B]."""
    draws = [stream(config.seed, UNCONDITIONAL, epoch, int(i)).random() for i in indices]
    return torch.tensor(draws) < config.uncond_ratio


def pair_logprobs(model: nn.Module, tokens: Tensor, labels: Tensor, negatives: Tensor, stochastic: bool) -> tuple[Tensor, Tensor]:
    """log p(x|c) and log p(x|c-) of each row, positives and negatives as one batch: two [B].

    Where c- equals c the two are one number, unless dropout makes them differ, so such rows are
    run once.
    """
    rows = torch.arange(len(labels), device=labels.device) if stochastic else (labels != negatives).nonzero().flatten()
    logp = model(torch.cat([labels, negatives[rows]]), torch.cat([tokens, tokens[rows]]))
    positive, rest = logp.split([len(labels), len(rows)])
    return positive, positive.index_copy(0, rows, rest)


class Trainer:
    """Holds policy, reference and optimizer; ``step`` is one optimizer step on a global batch."""

    def __init__(self, model: ARImageModel, config: TrainingConfig, micro_batch_size: int, processes: Processes):
        self.model, self.config, self.processes = model.to(processes.device), config, processes
        self.micro_batch_size = micro_batch_size
        model.transformer.train()
        self.stochastic = model.stochastic
        self.reference = None
        if config.loss in CONTRASTIVE_LOSSES:
            # Same tokenizer object; the reference keeps training mode, as in the published runs.
            self.reference = copy.deepcopy(model, {id(model.tokenizer): model.tokenizer}).requires_grad_(False)
        self.optimizer = make_optimizer(model, config)
        parallel = processes.world > 1
        self.policy = DistributedDataParallel(model, broadcast_buffers=False) if parallel else model
        self.autocast = torch.autocast(processes.device.type, DTYPES[config.dtype], enabled=config.dtype != "float32")

    def micro_loss(self, tokens: Tensor, labels: Tensor, negatives: Tensor, uncond: Tensor) -> tuple[Tensor, dict]:
        """Mean loss of one micro-batch and its diagnostics."""
        if self.reference is None:
            with self.autocast:
                return -self.policy(labels, tokens).mean(), {}
        with torch.inference_mode(), self.autocast:
            ref_positive, ref_negative = pair_logprobs(self.reference, tokens, labels, negatives, self.stochastic)
        with self.autocast:
            positive, negative = pair_logprobs(self.policy, tokens, labels, negatives, self.stochastic)
        reward, negative_reward = positive - ref_positive, negative - ref_negative
        loss = CONTRASTIVE_LOSSES[self.config.loss](reward, negative_reward, labels == negatives, self.config.beta, self.config.lam)
        return loss, diagnostics(reward.detach(), negative_reward.detach(), uncond)

    def step(self, index: int, tokens: Tensor, labels: Tensor, negatives: Tensor, uncond: Tensor) -> dict[str, float]:
        """Optimizer step ``index`` on this process's part of the global batch.

        Args:
            tokens: [n, L]; labels, negatives: classes [n] after the null-class draw; uncond: bool [n].

        Returns:
            metrics of the whole global batch.
        """
        config, device = self.config, self.processes.device
        torch.manual_seed(int(stream(config.seed, DROPOUT, index, self.processes.rank).integers(2**62)))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(index, config)
        parts = range(0, len(tokens), self.micro_batch_size)
        total_loss, sums = 0.0, {}
        for start in parts:
            part = slice(start, start + self.micro_batch_size)
            batch = [t[part].to(device) for t in (tokens, labels, negatives, uncond)]
            share = len(batch[0]) / config.batch_size
            last = start == parts[-1]
            # One all-reduce per optimizer step: gradients of the earlier micro-batches stay local.
            with nullcontext() if last or self.processes.world == 1 else self.policy.no_sync():
                loss, found = self.micro_loss(*batch)
                (loss * share * self.processes.world).backward()
            total_loss += loss.item() * share
            for name, (value, count) in found.items():
                old = sums.get(name, (0.0, 0))
                sums[name] = (old[0] + value, old[1] + count)
        norm = nn.utils.clip_grad_norm_([p for p in self.model.transformer.parameters()], config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        flat = torch.tensor([total_loss, *(v for pair in sums.values() for v in pair)], dtype=torch.float64)
        flat = self.processes.sum(flat.to(device)).tolist()
        means = {name: flat[1 + 2 * i] / flat[2 + 2 * i] for i, name in enumerate(sums) if flat[2 + 2 * i]}
        return {"loss": flat[0], **means, "grad_norm": float(norm), "lr": self.optimizer.param_groups[0]["lr"]}

    def state(self) -> dict:
        return {"model": self.model.transformer.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict) -> None:
        self.model.transformer.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class RunFolder:
    """The output folder of one run: config, metrics, TensorBoard, resumable state, exported model."""

    def __init__(self, path: Path, processes: Processes, description: dict):
        self.path, self.processes = path, processes
        self.state_path, self.metrics_path = path / "state" / "latest.pt", path / "metrics.jsonl"
        self.writer = None
        if (path / "config.json").exists():
            before = json.loads((path / "config.json").read_text())["options"]
            changed = [k for k, v in description["options"].items() if before.get(k, v) != v]
            if changed:
                raise UserError(
                    f"--output: {path} holds a run with other options: "
                    + ", ".join(f"{k} {before[k]} instead of {description['options'][k]}" for k in changed)
                    + "; take these, or another folder"
                )
        elif processes.main:
            self.state_path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path / "config.json", lambda temporary: temporary.write_text(json.dumps(description, indent=2) + "\n"))

    def resume(self, trainer: Trainer) -> int:
        """Load the last saved state if there is one; returns the number of steps done."""
        done = 0
        if self.state_path.exists():
            saved = torch.load(self.state_path, map_location="cpu", weights_only=True)
            trainer.load_state(saved)
            done = saved["step"]
        self.processes.barrier()
        if self.processes.main:
            lines = self.metrics_path.read_text().splitlines(keepends=True) if self.metrics_path.exists() else []
            atomic_write(self.metrics_path, lambda temporary: temporary.write_text("".join(lines[:done])))
            self.writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=done or None)
        return done

    def log(self, step: int, metrics: dict[str, float]) -> None:
        with open(self.metrics_path, "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def save(self, trainer: Trainer, done: int) -> None:
        if self.processes.main:
            content = {"step": done, **trainer.state()}
            atomic_write(self.state_path, lambda temporary: torch.save(content, temporary))
            save_published(trainer.model.transformer.state_dict(), self.path / trainer.model.checkpoint_name)
            self.writer.flush()
        self.processes.barrier()


def train(
    model: ARImageModel,
    data: TokenSource,
    config: TrainingConfig,
    micro_batch_size: int,
    folder: RunFolder,
    processes: Processes,
    save_every: int,
    log_every: int,
) -> None:
    """Run or resume training up to ``config.max_steps``, then leave model and state in ``folder``."""
    if len(data.labels) < config.batch_size:
        raise UserError(f"--batch-size: {config.batch_size} is more than the {len(data.labels)} images of the data")
    trainer = Trainer(model, config, micro_batch_size, processes)
    done = folder.resume(trainer)
    stop = False

    def ask_to_stop(*_) -> None:
        nonlocal stop
        stop = True

    previous = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGTERM, signal.SIGINT)}
    bar = tqdm(total=config.max_steps, initial=done, desc=f"{config.loss} {folder.path.name}", disable=not processes.main)
    share = processes.share(config.batch_size)
    for epoch, indices in global_batches(len(data.labels), config, done):
        began = time.perf_counter()
        uncond = unconditional_rows(indices, epoch, config)
        labels, negatives = pair_labels(data.labels[indices], uncond, model.null_class)
        tokens = data.tokens(indices[share], epoch)
        metrics = trainer.step(done, tokens, labels[share], negatives[share], uncond[share])
        metrics["images_per_second"] = config.batch_size / (time.perf_counter() - began)
        done += 1
        if processes.main:
            folder.log(done, metrics)
            bar.update()
            if done % log_every == 0:
                shown = ("loss", "accuracy", "margin", "images_per_second")
                bar.set_postfix({k: f"{metrics[k]:.4g}" for k in shown if k in metrics})
        # A signal reaches the processes at different moments; they agree on the step to stop at.
        stop = bool(processes.sum(torch.tensor(float(stop), device=processes.device)))
        if stop or done % save_every == 0 or done == config.max_steps:
            folder.save(trainer, done)
        if stop and done < config.max_steps:
            if processes.main:
                bar.close()
                print(f"stopped and saved after step {done}; the same command goes on from there")
            break
    bar.close()
    for number, handler in previous.items():
        signal.signal(number, handler)


def describe(config: TrainingConfig, extra: dict) -> dict:
    """Content of ``config.json``: ``options`` must agree on resuming, the rest is provenance."""
    return {"options": {**asdict(config), **extra}, "versions": {"torch": torch.__version__, "numpy": np.__version__}}
