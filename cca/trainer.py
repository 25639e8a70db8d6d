"""The training step of both backbones: reward of policy over reference, one loss, one optimizer step.

Everything random belongs to an image or a step (see ``cca.random``), and negatives are rolled
over the global batch, so neither the micro-batch size nor the number of processes changes what
is trained.
"""

import copy
import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cca.distributed import Processes
from cca.errors import UserError
from cca.losses import CONTRASTIVE_LOSSES, diagnostics
from cca.plan import TrainingConfig, learning_rate, weight_decay
from cca.random import DROPOUT, stream
from models.base import ARImageModel, ARTransformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SKIPPED = 10  # steps in a row without a finite gradient


def make_optimizer(model: ARImageModel, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95); no decay for vectors and the names the backbone exempts."""
    trained = [(k, p) for k, p in model.transformer.named_parameters() if p.requires_grad]
    decays = {k: p.ndim >= 2 and not any(part in k for part in model.no_decay) for k, p in trained}
    groups = [
        {"params": [p for k, p in trained if decays[k]], "weight_decay": config.weight_decay},
        {"params": [p for k, p in trained if not decays[k]], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def pair_logprobs(
    net: nn.Module, inputs: Tensor, tokens: Tensor, labels: Tensor, negatives: Tensor, twice: bool
) -> tuple[Tensor, Tensor]:
    """log p(x|c) and log p(x|c-) of each row, positives and negatives as one batch: two [B].

    Where c- equals c the two are one number, and such rows are run once, unless ``twice``: with
    dropout they differ.
    """
    rows = (
        torch.arange(len(labels), device=labels.device)
        if twice
        else (labels != negatives).nonzero().flatten()
    )
    logp = net(
        torch.cat([labels, negatives[rows]]),
        torch.cat([inputs, inputs[rows]]),
        torch.cat([tokens, tokens[rows]]),
    )
    positive, rest = logp.split([len(labels), len(rows)])
    return positive, positive.index_copy(0, rows, rest)


def shard(net: ARTransformer, processes: Processes) -> None:
    """FSDP2: parameters, gradients and optimizer state of each block split over all processes."""
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for block in net.stack:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


class Trainer:
    """Holds policy, reference and optimizer; ``step`` is one optimizer step on a global batch."""

    def __init__(
        self,
        model: ARImageModel,
        config: TrainingConfig,
        micro_batch_size: int,
        processes: Processes,
        parallel: str = "ddp",
        compile: bool = False,
        checkpointing: bool = False,
    ):
        self.model, self.config, self.processes = model.to(processes.device), config, processes
        self.micro_batch_size = micro_batch_size
        self.net = model.transformer.train()
        self.stochastic = model.stochastic
        self.sharded = parallel == "fsdp" and processes.world > 1
        self.reference = None
        if config.loss in CONTRASTIVE_LOSSES:
            # The reference keeps training mode, as in the published runs: its dropout is on.
            self.reference = copy.deepcopy(self.net).requires_grad_(False)
            if not self.sharded:
                self.reference.store_matrices(DTYPES[config.dtype])  # half the memory
        self.net.checkpointing = checkpointing
        for net in (self.net, self.reference):
            if net is not None and compile:
                for block in net.stack:
                    block.compile()
            if net is not None and self.sharded:
                shard(net, processes)
        self.policy: nn.Module = self.net
        if processes.world > 1 and not self.sharded:
            self.policy = DistributedDataParallel(self.net, broadcast_buffers=False)
        self.optimizer = make_optimizer(model, config)
        device = processes.device.type
        self.autocast = torch.autocast(device, DTYPES[config.dtype], enabled=config.dtype != "float32")
        self.scaler = torch.amp.GradScaler(
            device, init_scale=2.0**11, growth_interval=1000, enabled=config.dtype == "float16"
        )
        # float32 copies; empty without --ema.
        self.ema = {k: p.detach().clone() for k, p in self.net.named_parameters()} if config.ema else {}
        self.skipped = self.skipped_in_a_row = 0

    def micro_loss(
        self, tokens: Tensor, labels: Tensor, negatives: Tensor, uncond: Tensor
    ) -> tuple[Tensor, dict]:
        """Mean loss of one micro-batch and its diagnostics."""
        inputs = self.model.inputs(tokens)
        if self.reference is None:
            with self.autocast:
                return -self.policy(labels, inputs, tokens).mean(), {}
        # FSDP's unsharded parameters must not become inference tensors.
        with torch.no_grad() if self.sharded else torch.inference_mode(), self.autocast:
            ref_positive, ref_negative = pair_logprobs(
                self.reference, inputs, tokens, labels, negatives, self.stochastic
            )
        with self.autocast:
            positive, negative = pair_logprobs(
                self.policy, inputs, tokens, labels, negatives, self.stochastic
            )
        reward, negative_reward = positive - ref_positive, negative - ref_negative
        loss = CONTRASTIVE_LOSSES[self.config.loss](
            reward, negative_reward, labels == negatives, self.config.beta, self.config.lam
        )
        return loss, diagnostics(reward.detach(), negative_reward.detach(), uncond)

    def synchronise(self, last: bool):
        """Context of one backward pass: gradients are reduced with the last micro-batch alone."""
        if self.sharded:
            self.net.set_requires_gradient_sync(last)
        return (
            self.policy.no_sync()
            if isinstance(self.policy, DistributedDataParallel) and not last
            else nullcontext()
        )

    def step(
        self, index: int, tokens: Tensor, labels: Tensor, negatives: Tensor, uncond: Tensor
    ) -> dict[str, float]:
        """Optimizer step ``index`` on this process's part of the global batch.

        Args:
            tokens: [n, L]; labels, negatives: classes [n] after the null-class draw; uncond: bool [n].

        Returns:
            metrics of the whole global batch. A step without a finite gradient leaves the weights
            as they are and is counted in ``skipped_steps``.

        Raises:
            UserError: MAX_SKIPPED such steps in a row.
        """
        config, device = self.config, self.processes.device
        torch.manual_seed(int(stream(config.seed, DROPOUT, index, self.processes.rank).integers(2**62)))
        lr, decay = learning_rate(index, config), weight_decay(index, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.param_groups[0]["weight_decay"] = decay
        parts = range(0, len(tokens), self.micro_batch_size)
        total_loss, sums = 0.0, {}
        for start in parts:
            batch = [
                t[start : start + self.micro_batch_size].to(device)
                for t in (tokens, labels, negatives, uncond)
            ]
            share = len(batch[0]) / config.batch_size
            with self.synchronise(last=start == parts[-1]):
                loss, found = self.micro_loss(*batch)
                self.scaler.scale(loss * share * self.processes.world).backward()
            total_loss += loss.item() * share
            for name, (value, count) in found.items():
                old = sums.get(name, (0.0, 0))
                sums[name] = (old[0] + value, old[1] + count)
        flat = torch.tensor([total_loss, *(v for pair in sums.values() for v in pair)], dtype=torch.float64)
        flat = self.processes.sum(flat.to(device)).tolist()
        means = {name: flat[1 + 2 * i] / flat[2 + 2 * i] for i, name in enumerate(sums) if flat[2 + 2 * i]}
        norm = self.update(flat[0])
        return {
            "loss": flat[0],
            **means,
            "grad_norm": norm,
            "lr": lr,
            "weight_decay": decay,
            "skipped_steps": self.skipped,
        }

    def update(self, loss: float) -> float:
        """Clip and apply the gradients unless they are not finite; returns their norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.config.grad_clip)
        norm = float(norm.full_tensor() if self.sharded else norm)
        if math.isfinite(loss) and math.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.skipped_in_a_row = 0
            with torch.no_grad():
                for key, parameter in self.net.named_parameters() if self.ema else ():
                    self.ema[key].lerp_(parameter, 1 - self.config.ema)
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.scaler.update()  # after an overflow, unscale_ has told it so
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise UserError(
                f"--lr: {MAX_SKIPPED} steps in a row had no finite gradient (last loss {loss:g}); the state saved last is intact. "
                "A lower --lr or --dtype float32 helps"
            )
        return norm

    def state(self) -> dict:
        """Everything that decides the following steps, sharded where the model is."""
        net, optimizer = get_state_dict(self.net, self.optimizer)
        counters = torch.tensor([self.skipped, self.skipped_in_a_row])
        return {
            "model": net,
            "optimizer": optimizer,
            "ema": self.ema,
            "scaler": self.scaler.state_dict(),
            "counters": counters,
        }

    def load_state(self, state: dict) -> None:
        """Take back what ``state`` gave; ``ema`` was read in place."""
        set_state_dict(
            self.net, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.scaler.load_state_dict(state["scaler"])
        self.skipped, self.skipped_in_a_row = state["counters"].tolist()

    def full_weights(self) -> dict[str, Tensor]:
        """The whole state dict on the CPU (all processes take part; the main one gets it)."""
        if not self.sharded:
            return self.net.state_dict()
        return get_model_state_dict(
            self.net, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )

    def full_ema(self) -> dict[str, Tensor]:
        """The averaged weights in the published layout, constant buffers included."""
        averaged = {k: v.full_tensor().cpu() if self.sharded else v for k, v in self.ema.items()}
        return {**self.full_weights(), **averaged} if averaged else {}
