"""A model sharded with FSDP compared with the same model under DDP, on two ranks."""

from types import SimpleNamespace

import pytest
from commands import run

from cca.training.setup import check_parallel
from models import UserError

# With bfloat16, FSDP gathers the weights of linear layers in bfloat16. Measured: log-likelihoods (about -600
# and -1,100 nats) are bit-identical, gradient norms differ by 1e-6, and weights after two steps with a
# learning rate of 1e-4 differ by 7e-6. The same holds if both models are compiled with the backend below,
# which runs the traced graphs. (In PyTorch 2.9, gradient norms differ by 4e-5 between compiled and eager.)
# A block compiles to one graph without graph breaks, and its linear weights enter this graph in bfloat16.
SHARDED = """
import sys
from functools import cache, partial

import torch
from torch._dynamo import lookup_backend

import models.log_likelihood
from cca.distributed import Ranks
from cca.training.batch import Batch
from cca.losses import pair_labels
from cca.training.schedule import TrainingConfig
from cca.training.trainer import Trainer
from models import autocast, load_model

processes = Ranks()
graphs = []  # matrix products of each, and the precisions of its inputs by shape


def backend(graph, inputs):
    products = sum("linear" in str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    graphs.append((products, {(tuple(t.shape), t.dtype) for t in tensors}))
    return lookup_backend("aot_eager")(graph, inputs)


compile_block = torch.nn.Module.compile
torch.nn.Module.compile = lambda block: compile_block(block, backend=backend)
models.log_likelihood.compiled_function = cache(partial(torch.compile, backend=backend, fullgraph=True))
config = TrainingConfig(
    loss="cca", beta=0.1, lambda_=10.0, uncond_ratio=0.1, batch_size=8, lr=1e-4, weight_decay=0.05,
    final_weight_decay=None, ema=0.9, grad_clip=1.0, warmup=0.0, final_lr=1.0, schedule_accumulation=1,
    max_steps=2, seed=0, dtype="bfloat16",
)
for name, checkpointing in (("var-mini", True), ("llamagen-mini", False)):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(512, (8, load_model(name).sequence_length), generator=generator)
    uncond = torch.arange(8) == 3
    labels, negatives = pair_labels(torch.arange(8), uncond, 10)
    batch = Batch(tokens, labels, negatives, uncond).map(lambda rows: rows[processes.share(8)])

    found, compile = {}, sys.argv[1] == "compiled"
    for parallel in ("ddp", "fsdp"):
        graphs.clear()
        model = load_model(name)
        model.transformer.checkpointing = checkpointing
        trainer = Trainer(model, config, 2, processes, parallel, compile)
        dtypes = set()
        for key, module in trainer.net.transformer_blocks()[0].named_modules():
            if getattr(module, "weight", None) is not None and not compile:
                module.register_forward_pre_hook(
                    lambda module, _, key=key: dtypes.add(("norm" in key, module.weight.dtype))
                )
        inputs = trainer.model.inputs(batch.images)
        with autocast(processes.device, config.dtype):
            logprob = trainer.policy(batch.labels, inputs, batch.images).detach()
        lines = [trainer.optimizer_step(step, batch) for step in range(2)]
        found[parallel] = logprob, lines, {**trainer.full_weights()}, {**trainer.full_ema()}
        if parallel == "ddp":  # views of its buckets, in the later steps' first micro-batches too
            gradients = [p.grad.untyped_storage().data_ptr() for p in trainer.net.parameters()]
            assert len({*gradients}) < len(gradients) / 4, gradients
            skipping = Trainer(load_model(name), config, 2, processes)
            skipping.clip = lambda: torch.tensor(torch.inf)
            assert skipping.optimizer_step(0, batch)["skipped_steps"] == 1
            moments = skipping.state()["optimizer"]["state"]  # of a state saved now, all the same
            assert len(moments) == len(gradients)
        if parallel == "fsdp" and compile:
            block = trainer.net.transformer_blocks()[0]
            layers = [part for part in block.modules() if isinstance(part, torch.nn.Linear)]
            matrices = {(tuple(layer.weight.shape), torch.bfloat16) for layer in layers}
            of_blocks = [graph for graph in graphs if graph[0] != 1]  # the likelihood's have one product
            assert {products for products, _ in of_blocks} == {len(layers)}, graphs
            assert all(matrices <= inputs for _, inputs in of_blocks), graphs
        elif parallel == "fsdp":
            assert (False, torch.bfloat16) in dtypes and (True, torch.bfloat16) not in dtypes, dtypes
            assert all(p.dtype == torch.float32 for p in trainer.net.parameters())
            matrices = [p for p in trainer.reference.transformer_blocks().parameters() if p.ndim == 2]
            assert all(p.dtype == torch.bfloat16 for p in matrices)
            other = load_model(name)
            other.transformer.checkpointing = checkpointing
            other = Trainer(other, config, 2, processes, parallel)
            other.load_state(trainer.state())
            assert other.optimizer_step(1, batch) == trainer.optimizer_step(1, batch)

    whole, first, *weights = found["ddp"]
    logprob, lines, *others = found["fsdp"]
    torch.testing.assert_close(logprob, whole, rtol=1e-6, atol=0)
    for a, b in zip(first, lines, strict=True):
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=1e-5, atol=1e-5)
    for a, b in zip(weights, others) if processes.is_main else ():
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=0, atol=2e-5)
"""


@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_fsdp_in_bfloat16_equals_ddp(mode, tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    run(tmp_path / "sharded.py", mode, processes=2, PYTHONPATH=".")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 1}, "--batch-size: 1 is less than the number of ranks"),
        ({"batch_size": 7}, "--batch-size: 7 must be a multiple of the number of ranks"),
        ({"dtype": "float16"}, "--dtype: float16 does not work with --parallel fsdp"),
        ({"sample_every": 5}, "--sample-every: does not work with --parallel fsdp"),
    ],
)
def test_options_that_fsdp_refuses(options, message):
    """One rank shards nothing and accepts these options, because a recipe may set fsdp."""
    arguments = SimpleNamespace(**{"batch_size": 8, "dtype": "bfloat16", "sample_every": 0, **options})
    with pytest.raises(UserError, match=f"^{message}"):
        check_parallel(arguments, arguments, "fsdp", SimpleNamespace(world_size=2))
    check_parallel(arguments, arguments, "fsdp", SimpleNamespace(world_size=1))
