"""The training step of both backbones: rewards of policy over reference, loss, optimizer step.

Crops and the null class are sampled by image and epoch (see ``cca.random_streams``), and negatives are
rolled over the global batch. So neither the micro-batch size nor the number of ranks changes what is
trained, except for rounding. For models with dropout or stochastic depth (``ARImageModel.stochastic``) both
change the masks, but not their distribution: each rank has one seed per step, and the micro-batches sample
their masks one after the other.
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
from cca.training.batch import Batch
from cca.training.encoding import to_tokens
from cca.training.schedule import learning_rate, weight_decay
from models import DTYPES, ARImageModel, ARTransformer, UserError, autocast
from models.utils.precision import upload
from models.zoo.checkpoint_formats import not_finite

# Our buffers are constant, so DDP need not synchronise them. PyTorch 2.14 renamed the option.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
NO_BUFFER_SYNC: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}
MAX_SKIPPED = 10  # steps in a row without a finite gradient


def make_optimizer(model: ARImageModel, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW (betas 0.9, 0.95) without weight decay for vectors and the names in ``no_decay``."""
    trained = [(k, p) for k, p in model.transformer.named_parameters() if p.requires_grad]
    decays = {k: p.ndim >= 2 and not any(part in k for part in model.no_decay) for k, p in trained}
    groups = [
        {"params": [p for k, p in trained if decays[k]], "weight_decay": config.weight_decay},
        {"params": [p for k, p in trained if not decays[k]], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def pair_logprobs(net: nn.Module, inputs: Tensor, batch: Batch, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(x|c) and log p(x|c-) of each batch entry, both [B], from one forward pass.

    indices: int64 [n], entries that also run under their negative class. The others have two equal values.
    """
    labels, tokens = batch.labels, batch.images
    logp = net(
        torch.cat([labels, batch.negatives[indices]]),
        torch.cat([inputs, inputs[indices]]),
        torch.cat([tokens, tokens[indices]]),
    )
    positive, negative = logp.split([len(labels), len(indices)])
    return positive, positive.index_copy(0, indices, negative)


def reward_metrics(
    logps: tuple[Tensor, Tensor], rewards: tuple[Tensor, Tensor], uncond: Tensor, scale: float
) -> dict[str, Tensor]:
    """Return the metrics of each batch entry, each [B], under TRL's names.

    Args:
        logps: log p(x_i|c_i) and log p(x_i|c_i-), each [B], in nats.
        rewards: r(x_i, c_i), the chosen one, and r(x_i, c_i-), the rejected one, each [B], in nats.
        uncond: bool [B], entries with the null class; the others have 0 as "rewards/null".
        scale: factor of the rewards; see ``Loss.reward_scale``.
    """
    (logp, negative_logp), (reward, negative_reward) = logps, rewards
    return {
        "rewards/chosen": scale * reward,
        "rewards/rejected": scale * negative_reward,
        "rewards/margins": scale * (reward - negative_reward),
        "rewards/accuracies": reward > negative_reward,
        "rewards/null": torch.where(uncond, scale * reward, 0),
        "null": uncond,
        "logps/chosen": logp,
        "logps/rejected": negative_logp,
    }


def shard(net: ARTransformer, ranks: Ranks, dtype: torch.dtype) -> None:
    """Shard parameters, gradients and optimizer state of each block over all ranks with FSDP2.

    The weights of linear layers in a block are gathered in ``dtype``, the precision of autocast, and their
    gradients are reduced in float32. The other parameters of a block (norms, temperatures) are small. They
    are in one float32 group with all parameters outside the blocks. So nothing is gathered inside a block,
    which would break its compiled graph.

    That group is gathered once per pass and kept until its gradients are computed. The blocks' groups are
    gathered twice. A few linear layers are in the float32 group as well: groups of their own, in 16 bits,
    would need more collectives for as many bytes. The output layer cannot have its own group, because the
    likelihood reads its weight and never calls it.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    # FSDP warns that outputs of layers must not be changed in place. No block does that.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    layers = [m for m in net.transformer_blocks().modules() if isinstance(m, nn.Linear)]
    fully_shard(net, mesh=mesh, ignored_params={p for layer in layers for p in layer.parameters()})
    others: set[nn.Parameter] = {p for p in net.transformer_blocks().parameters() if isinstance(p, DTensor)}
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in net.transformer_blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=others)


def _full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor unsharded, whether or not FSDP sharded it. All ranks take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_finite(state: dict[str, Any]) -> None:
    """Raise UserError if a trained weight is NaN or infinite."""
    if wrong := not_finite(state):
        raise UserError(
            f"--lr: the trained weights are not finite ({wrong}), so no model is written; "
            "start a new run in another folder with a lower --lr or --weight-decay, or with --dtype float32"
        )


class Trainer:
    """Policy, reference and optimizer. ``optimizer_step`` trains on one global batch.

    If ``model.transformer.checkpointing`` is set, the backward pass computes the blocks' activations again.
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
            # The reference stays in training mode, with dropout on, as in the published runs.
            self.reference = copy.deepcopy(self.net).requires_grad_(False)
            self.reference.store_matrices(DTYPES[config.dtype])  # halves its memory
        if compile:
            # DDP's optimiser would break the blocks' graphs to reduce some of a block's gradients earlier.
            torch._dynamo.config.optimize_ddp = False
        for net in (self.net, self.reference):
            if net is not None and compile:
                net.compile_parts(varying_rows=self.objective is not None and not model.stochastic)
            if net is not None and self.sharded:
                shard(net, ranks, DTYPES[config.dtype])
        self.policy: nn.Module = self.net
        if ranks.world_size > 1 and not self.sharded:
            self.policy = DistributedDataParallel(self.net, gradient_as_bucket_view=True, **NO_BUFFER_SYNC)
        self.optimizer = make_optimizer(model, config)
        self.autocast = autocast(ranks.device, config.dtype)
        self.scaler = torch.amp.GradScaler(
            ranks.device.type, init_scale=2.0**11, growth_interval=1000, enabled=config.dtype == "float16"
        )
        # Copies of the weights in float32; empty without --ema.
        self.ema = {k: p.detach().clone() for k, p in self.net.named_parameters()} if config.ema else {}
        self.skipped = self.skipped_in_a_row = 0

    def pair_indices(self, batch: Batch) -> Tensor:
        """Return the indices int64 [n] of batch entries that also run under their negative class.

        If c- equals c, one pass gives both likelihoods, unless dropout makes them differ.
        """
        return (~batch.same_label | self.model.stochastic).nonzero().flatten()

    def micro_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss [] of a micro-batch of tokens, and the ``reward_metrics`` of its entries.

        The host does not wait for the device here.
        """
        config, device = self.config, self.ranks.device
        pairs = upload(self.pair_indices(batch), device)
        batch = batch.to(device)
        inputs = self.model.inputs(batch.images)
        if self.objective is None or self.reference is None:
            with self.autocast:
                logp = self.policy(batch.labels, inputs, batch.images)
                return -logp.mean(), {"logps/chosen": logp}
        # FSDP's unsharded parameters must not become inference tensors.
        with torch.no_grad() if self.sharded else torch.inference_mode(), self.autocast:
            ref_positive, ref_negative = pair_logprobs(self.reference, inputs, batch, pairs)
        with self.autocast:
            positive, negative = pair_logprobs(self.policy, inputs, batch, pairs)
        reward, negative_reward = positive - ref_positive, negative - ref_negative
        loss = self.objective(reward, negative_reward, batch.same_label, config.beta, config.lambda_)
        logps, rewards = (positive, negative), (reward, negative_reward)
        return loss, reward_metrics(logps, rewards, batch.uncond, self.reward_scale)

    def synchronise(self, last: bool):
        """Return the context of one backward pass; ranks reduce gradients only with the last micro-batch."""
        if isinstance(self.net, FSDPModule):
            self.net.set_requires_gradient_sync(last)
        return (
            self.policy.no_sync()
            if isinstance(self.policy, DistributedDataParallel) and not last
            else nullcontext()
        )

    def optimizer_step(self, step: int, batch: Batch) -> dict[str, float]:
        """Run step ``step`` (from 0) on this rank's part of the global batch, pixels or tokens.

        Returns:
            metrics of the global batch. A step without a finite gradient does not change the weights
            and is counted in ``skipped_steps``.

        Raises:
            UserError: MAX_SKIPPED steps in a row had no finite gradient.
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
        metrics: list[dict[str, Tensor]] = []  # of each image, by micro-batch
        for part in parts:
            with self.synchronise(last=part is parts[-1]):
                loss, of_part = self.micro_loss(part)
                share = len(part) / config.batch_size
                self.scaler.scale(loss * share * self.ranks.world_size).backward()
            metrics.append({"loss": loss.expand(len(part)), **of_part})
        values = [torch.cat([of_part[name] for of_part in metrics]).detach() for name in metrics[0]]
        sums = self.ranks.all_reduce(torch.stack([value.double().sum() for value in values]))
        # The host waits for the GPU only here.
        *totals, norm = torch.cat([sums, self.clip()[None].double()]).tolist()
        means = {name: total / config.batch_size for name, total in zip(metrics[0], totals)}
        if null_share := means.pop("null", 0):
            means["rewards/null"] /= null_share
        else:
            means.pop("rewards/null", None)
        self.update(means["loss"], norm)
        return means | {"grad_norm": norm, "lr": lr, "weight_decay": decay, "skipped_steps": self.skipped}

    def clip(self) -> Tensor:
        """Clip the gradients and return their norm before clipping, [] on the device."""
        self.scaler.unscale_(self.optimizer)
        return _full_tensor(nn.utils.clip_grad_norm_(self.net.parameters(), self.config.grad_clip))

    @torch.no_grad()
    def update(self, loss: float, norm: float) -> None:
        """Apply the gradients if they and the loss are finite, else count a skipped step."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.skipped_in_a_row = 0
            if self.ema:
                averages = tuple(self.ema.values())
                torch._foreach_lerp_(averages, tuple(self.net.parameters()), 1 - self.config.ema)
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.scaler.update()  # ``unscale_`` recorded whether there was an overflow
        # DDP's gradients are views of its buckets. Set to None, they would be allocated again beside the
        # buckets, 4 bytes more per parameter. Before the first finite step they must be None all the same:
        # only then does PyTorch create the moments for a checkpoint.
        views = isinstance(self.policy, DistributedDataParallel) and bool(self.optimizer.state)
        self.optimizer.zero_grad(set_to_none=not views)
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise UserError(
                f"--lr: {MAX_SKIPPED} steps in a row had no finite gradient (last loss {loss:g}); "
                "start again with a lower --lr or with --dtype float32. The last checkpoint is intact"
            )

    def state(self) -> dict:
        """Return the state dict that an exact resume needs, sharded if the model is."""
        is_new = not self.optimizer.state
        net, optimizer = get_state_dict(self.net, self.optimizer)
        if is_new:  # PyTorch created the moments by a step with zero gradients, which must not count
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
        """Load what ``state`` returned. ``ema`` was already read in place."""
        set_state_dict(
            self.net, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.scaler.load_state_dict(state["scaler"])
        self.skipped, self.skipped_in_a_row = state["counters"].tolist()

    def full_weights(self) -> dict[str, Any]:
        """Return the full state dict; of a sharded model, on rank 0's CPU only. All ranks take part."""
        if not self.sharded:
            return self.net.state_dict()
        return get_model_state_dict(
            self.net, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )

    def full_ema(self) -> dict[str, Tensor]:
        """Return the averaged parameters on rank 0's CPU; empty without --ema. All ranks take part."""
        full_tensors = ((name, _full_tensor(tensor)) for name, tensor in self.ema.items())
        return {name: tensor.cpu() for name, tensor in full_tensors if self.ranks.is_main}
