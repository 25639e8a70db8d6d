"""The training step of both backbones: reward of policy over reference, one loss, one optimizer step.

Crops and null-class draws belong to an image or an epoch (see ``cca.random_streams``), and negatives are
rolled over the global batch, so neither the micro-batch size nor the number of processes changes what
is trained, but for rounding. Of models with dropout or stochastic depth (``ARImageModel.stochastic``)
both change the masks, not their distribution: a step has a seed for each process, and its micro-batches
draw one after the other.
"""

import copy
import inspect
import math
import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cca.config import TrainingConfig
from cca.distributed import Ranks
from cca.losses import LOSSES
from cca.random_streams import DROPOUT, stream
from cca.training.batch import Batch, Sums, diagnostics, sum_values
from cca.training.encoding import to_tokens
from cca.training.schedule import learning_rate, weight_decay
from models import DTYPES, ARImageModel, ARTransformer, UserError, autocast
from models.utils.precision import upload
from models.zoo.checkpoint_formats import not_finite

# Our buffers are constants. PyTorch 2.14 gave the option its new name, and warns of the old one.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
BUFFERS_ALONE: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}
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


def pair_logprobs(net: nn.Module, inputs: Tensor, batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x|c) and log p(x|c-) of each row, positives and negatives as one forward pass: two [B].

    ``rows`` [n] int64 are those run under their negative class as well; in the others the two are one number.
    """
    labels, tokens = batch.labels, batch.images
    logp = net(
        torch.cat([labels, batch.negatives[rows]]),
        torch.cat([inputs, inputs[rows]]),
        torch.cat([tokens, tokens[rows]]),
    )
    positive, rest = logp.split([len(labels), len(rows)])
    return positive, positive.index_copy(0, rows, rest)


def shard(net: ARTransformer, ranks: Ranks, dtype: torch.dtype) -> None:
    """FSDP2: parameters, gradients and optimizer state of each block split over all processes.

    The matrices of a block are gathered in ``dtype``, in which autocast computes with them, and their
    gradients added up in float32. What else a block has (norms, temperatures) is small: it belongs to the
    group of all that is outside of the blocks, in float32. So nothing is gathered within a block, which
    would cut its compiled graph.

    That group is gathered once in a pass and kept until its gradients are there, the blocks' matrices
    twice. It holds a few linear layers too: as groups of their own, in 16 bits, they would be as many bytes
    in more exchanges. The output layer cannot be one: the likelihood takes its weight, and does not call it.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    # It warns that a layer's output must not be changed in place, which no block does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    layers = [m for m in net.transformer_blocks().modules() if isinstance(m, nn.Linear)]
    fully_shard(net, mesh=mesh, ignored_params={p for layer in layers for p in layer.parameters()})
    others: set[nn.Parameter] = {p for p in net.transformer_blocks().parameters() if isinstance(p, DTensor)}
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in net.transformer_blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=others)


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP may have split, whole (all processes take part)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_finite(state: dict[str, Any]) -> None:
    """Raise UserError where a trained weight is NaN or infinite: nothing of such a model is worth writing."""
    if wrong := not_finite(state):
        raise UserError(
            f"--lr: the trained weights are not finite ({wrong}), so no model is written; "
            "begin again in another folder with a lower --lr or --weight-decay, or --dtype float32"
        )


class Trainer:
    """Holds policy, reference and optimizer; ``optimizer_step`` is one on a global batch.

    Of a model whose ``transformer.checkpointing`` is set, the blocks are computed again in backward passes.
    """

    def __init__(
        self,
        model: ARImageModel,
        config: TrainingConfig,
        micro_batch_size: int,
        ranks: Ranks,
        parallel: str = "ddp",
        compile: bool = False,
    ):
        self.model, self.config, self.ranks = model.to(ranks.device), config, ranks
        self.micro_batch_size = micro_batch_size
        self.net = model.transformer.train()
        self.sharded = parallel == "fsdp" and ranks.world_size > 1
        self.objective = LOSSES[config.loss].objective
        self.reward_scale = LOSSES[config.loss].reward_scale(config.beta)
        self.reference: ARTransformer | None = None
        if self.objective is not None:
            # The reference keeps training mode, as in the published runs: its dropout is on.
            self.reference = copy.deepcopy(self.net).requires_grad_(False)
            self.reference.store_matrices(DTYPES[config.dtype])  # half the memory
        if compile:
            # It would cut the blocks' graphs, to reduce parts of a block's gradients earlier.
            torch._dynamo.config.optimize_ddp = False
        for net in (self.net, self.reference):
            if net is not None and compile:
                net.compile_parts(varying_rows=self.objective is not None and not model.stochastic)
            if net is not None and self.sharded:
                shard(net, ranks, DTYPES[config.dtype])
        self.policy: nn.Module = self.net
        if ranks.world_size > 1 and not self.sharded:
            self.policy = DistributedDataParallel(self.net, gradient_as_bucket_view=True, **BUFFERS_ALONE)
        self.optimizer = make_optimizer(model, config)
        self.autocast = autocast(ranks.device, config.dtype)
        self.scaler = torch.amp.GradScaler(
            ranks.device.type, init_scale=2.0**11, growth_interval=1000, enabled=config.dtype == "float16"
        )
        # float32 copies; empty without --ema.
        self.ema = {k: p.detach().clone() for k, p in self.net.named_parameters()} if config.ema else {}
        self.skipped = self.skipped_in_a_row = 0

    def paired_rows(self, batch: Batch) -> Tensor:
        """Return the rows [n] int64 of a batch that are run under their negative class as well.

        Where c- equals c, one forward pass gives both likelihoods, but with dropout they differ.
        """
        return (~batch.same_label | self.model.stochastic).nonzero().flatten()

    def micro_loss(self, batch: Batch) -> tuple[Tensor, Sums]:
        """Return the mean loss [] of a micro-batch of tokens and its diagnostics.

        Nothing here waits for the device.
        """
        config, device = self.config, self.ranks.device
        pairs, null_rows = self.paired_rows(batch), batch.uncond.nonzero().flatten()
        batch, pairs, null_rows = batch.to(device), upload(pairs, device), upload(null_rows, device)
        inputs = self.model.inputs(batch.images)
        if self.objective is None or self.reference is None:
            with self.autocast:
                logp = self.policy(batch.labels, inputs, batch.images)
                return -logp.mean(), sum_values({"logps/chosen": logp})
        # FSDP's unsharded parameters must not become inference tensors.
        with torch.no_grad() if self.sharded else torch.inference_mode(), self.autocast:
            ref_positive, ref_negative = pair_logprobs(self.reference, inputs, batch, pairs)
        with self.autocast:
            positive, negative = pair_logprobs(self.policy, inputs, batch, pairs)
        reward, negative_reward = positive - ref_positive, negative - ref_negative
        loss = self.objective(reward, negative_reward, batch.same_label, config.beta, config.lambda_)
        logps, rewards = (positive, negative), (reward, negative_reward)
        return loss, diagnostics(logps, rewards, null_rows, self.reward_scale)

    def synchronise(self, last: bool):
        """Context of one backward pass: gradients are reduced with the last micro-batch alone."""
        if isinstance(self.net, FSDPModule):
            self.net.set_requires_gradient_sync(last)
        return (
            self.policy.no_sync()
            if isinstance(self.policy, DistributedDataParallel) and not last
            else nullcontext()
        )

    def optimizer_step(self, step: int, batch: Batch) -> dict[str, float]:
        """Do step ``step``, from 0, on this rank's part of the global batch, of pixels or of tokens.

        Returns:
            metrics of the whole global batch. A step without a finite gradient leaves the weights
            as they are and is counted in ``skipped_steps``.

        Raises:
            UserError: MAX_SKIPPED such steps in a row.
        """
        config, device = self.config, self.ranks.device
        torch.manual_seed(int(stream(config.seed, DROPOUT, step, self.ranks.rank).integers(2**62)))
        lr, decay = learning_rate(step, config), weight_decay(step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.param_groups[0]["weight_decay"] = decay
        if batch.images.dtype == torch.uint8:
            batch = replace(batch, images=to_tokens(self.model, batch.images, device))
        parts = list(batch.micro_batches(self.micro_batch_size))
        reports: list[dict] = []
        for part in parts:
            with self.synchronise(last=part is parts[-1]):
                loss, found = self.micro_loss(part)
                share = len(part) / config.batch_size
                self.scaler.scale(loss * share * self.ranks.world_size).backward()
            reports.append({"loss": (loss.detach().double() * len(part), len(part)), **found})
        names = list(reports[0])
        sums = torch.stack([sum(report[name][0] for report in reports) for name in names])
        counts = torch.tensor([sum(report[name][1] for report in reports) for name in names])
        totals = self.ranks.all_reduce(torch.cat([sums, upload(counts.double(), device)]))
        # The one moment of a step at which the host waits for a GPU.
        *found_totals, norm = torch.cat([totals, self.clip()[None].double()]).tolist()
        pairs = zip(found_totals, found_totals[len(names) :])
        means = {name: total / count for name, (total, count) in zip(names, pairs) if count}
        self.update(means["loss"], norm)
        return means | {"grad_norm": norm, "lr": lr, "weight_decay": decay, "skipped_steps": self.skipped}

    def clip(self) -> Tensor:
        """Clip the gradients; returns their norm [] before that, on the device."""
        self.scaler.unscale_(self.optimizer)
        return _whole(nn.utils.clip_grad_norm_(self.net.parameters(), self.config.grad_clip))

    @torch.no_grad()
    def update(self, loss: float, norm: float) -> None:
        """Apply the gradients unless they, or the loss, are not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.skipped_in_a_row = 0
            if self.ema:
                averages = tuple(self.ema.values())
                torch._foreach_lerp_(averages, tuple(self.net.parameters()), 1 - self.config.ema)
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.scaler.update()  # after an overflow, unscale_ has told it so
        # DDP's gradients are views of its buckets; without them (None) the next ones would lie beside these,
        # four bytes more for each weight. But PyTorch makes the moments of a state that is saved before the
        # first finite step only where there is no gradient.
        views = isinstance(self.policy, DistributedDataParallel) and bool(self.optimizer.state)
        self.optimizer.zero_grad(set_to_none=not views)
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise UserError(
                f"--lr: {MAX_SKIPPED} steps in a row had no finite gradient (last loss {loss:g}); "
                "the state saved last is intact. A lower --lr or --dtype float32 helps"
            )

    def state(self) -> dict:
        """Everything that decides the following steps, sharded where the model is."""
        is_new = not self.optimizer.state
        net, optimizer = get_state_dict(self.net, self.optimizer)
        if is_new:  # PyTorch has made the moments by a step with gradients of zero, which is not to count
            for moments in self.optimizer.state.values():
                moments["step"].zero_()
        return {
            "model": net,
            "optimizer": optimizer,
            "ema": self.ema,
            "scaler": self.scaler.state_dict(),
            "counters": torch.tensor([self.skipped, self.skipped_in_a_row]),
        }

    def load_state(self, state: dict) -> None:
        """Take back what ``state`` gave; ``ema`` was read in place."""
        set_state_dict(
            self.net, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.scaler.load_state_dict(state["scaler"])
        self.skipped, self.skipped_in_a_row = state["counters"].tolist()

    def full_weights(self) -> dict[str, Any]:
        """The whole state dict on the CPU (all processes take part; the main one gets it)."""
        if not self.sharded:
            return self.net.state_dict()
        return get_model_state_dict(
            self.net, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )

    def full_ema(self) -> dict[str, Any]:
        """The averaged weights in the published layout, constant buffers included; empty without --ema."""
        averaged = {k: _whole(v).cpu() for k, v in self.ema.items()}
        return {**self.full_weights(), **averaged} if averaged else {}
