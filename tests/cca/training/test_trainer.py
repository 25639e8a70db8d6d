"""The trainer's own step against six micro-steps of training with the published code."""

import copy
import signal
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from commands import TRAIN
from golden_models import build, golden
from torch import nn

import models.log_likelihood
import models.utils.precision
from benchmarks.workloads import random_batch
from cca.cli.output import Output
from cca.config import TrainingConfig
from cca.data.datasets import ImageArray
from cca.distributed import Ranks
from cca.losses import cca_loss, pair_labels
from cca.training.batch import Batch
from cca.training.loader import Loader
from cca.training.loop import train
from cca.training.run_folder import RunFolder
from cca.training.schedule import lr_factor
from cca.training.trainer import Trainer
from models import ARImageModel, UserError, load_model
from models.zoo.registry import TOKENIZERS, ZOO


def config_of(backbone: str, loss: str) -> TrainingConfig:
    is_var = backbone == "var"
    return TrainingConfig(
        loss=loss, beta=0.1, lambda_=10.0, uncond_ratio=0.1, batch_size=8, lr=1e-3, weight_decay=0.05,
        final_weight_decay=None, ema=0.0, grad_clip=2.0 if is_var else 1.0,
        warmup=2 / 6 if is_var else 0.0, final_lr=0.1 if is_var else 1.0,
        schedule_accumulation=2, max_steps=3, seed=0, dtype="float32",
    )  # fmt: skip


@pytest.mark.parametrize("loss", ["cca", "dpo", "unlearning"])
@pytest.mark.parametrize("backbone, model_name", [("var", "var_tiny_a"), ("llamagen", "llamagen_tiny_vq16")])
def test_training_trace(backbone, model_name, loss):
    trace = golden(f"train_trace_{backbone}_{loss}")
    trainer = Trainer(build(model_name), config_of(backbone, loss), micro_batch_size=4, ranks=Ranks())
    micro_losses = []
    micro_loss = trainer.micro_loss

    def record(batch):
        value = micro_loss(batch)
        micro_losses.append(value[0].item())
        return value

    trainer.micro_loss = record
    for step in range(3):
        pairs = [
            pair_labels(trace["labels"][i], trace["uncond_mask"][i], 7) for i in (2 * step, 2 * step + 1)
        ]
        labels, negatives = (torch.cat(part) for part in zip(*pairs))
        both = slice(2 * step, 2 * step + 2)
        tokens, uncond = trace["tokens"][both].flatten(0, 1), trace["uncond_mask"][both].flatten()
        metrics = trainer.optimizer_step(step, Batch(tokens, labels, negatives, uncond))
        assert metrics["grad_norm"] == pytest.approx(float(trace["grad_norms"][step]), rel=1e-3)
        if backbone == "var":
            assert metrics["lr"] == pytest.approx(float(trace["lrs"][2 * step + 1]), rel=1e-9)
    # The published runs back-propagate half of each micro-batch's loss and record the whole.
    torch.testing.assert_close(
        torch.tensor(micro_losses, dtype=torch.float64), trace["losses"], rtol=0, atol=1e-4
    )
    weights = trainer.model.transformer.state_dict()
    for key, expected in trace.items():
        if key.startswith("final/"):
            torch.testing.assert_close(
                weights[key.removeprefix("final/")].flatten()[:64], expected, rtol=0, atol=1e-5
            )


def published_loop(model, batches, micro_batch_size: int, config: TrainingConfig, max_norm: float):
    """Train as LlamaGen's trainers do: gradients of micro-batch means are summed, and the sum is clipped."""
    net, reference = model.transformer.train(), copy.deepcopy(model.transformer)
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))
    for batch in batches:
        optimizer.zero_grad()
        for part in batch.micro_batches(micro_batch_size):
            inputs = model.inputs(part.images)
            rewards = [
                net(labels, inputs, part.images) - reference(labels, inputs, part.images).detach()
                for labels in (part.labels, part.negatives)
            ]
            cca_loss(*rewards, part.same_label, config.beta, config.lambda_).backward()
        nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        optimizer.step()
    return net.state_dict()


@pytest.mark.parametrize("factor, least, most", [(1, 0, 0.005), (16, 0.3, 1)])
def test_the_clip_of_the_published_llamagen_trainers(factor, least, most):
    """Three steps of 16 micro-batches whose summed gradients are clipped at 1, here at 1/16 of the mean's.

    The weights then move alike but for AdamW's epsilon, which is 16 times as large beside our gradients.
    """
    clip, size = ZOO["llamagen-l"].recipes["cca"].grad_clip, 2 * 16
    config = replace(
        config_of("llamagen", "cca"), batch_size=size, lambda_=300.0, grad_clip=factor * clip,
        schedule_accumulation=16,
    )  # fmt: skip
    generator, batches = torch.Generator().manual_seed(0), []
    for _ in range(3):
        uncond = torch.rand(size, generator=generator) < 0.1
        tokens = torch.randint(512, (size, 64), generator=generator)
        pairs = pair_labels(torch.randint(10, (size,), generator=generator), uncond, 10)
        batches.append(Batch(tokens, *pairs, uncond))
    expected = published_loop(load_model("llamagen-mini"), batches, 2, config, max_norm=1.0)
    trainer = Trainer(load_model("llamagen-mini"), config, 8, Ranks())
    norms = [trainer.optimizer_step(step, batch)["grad_norm"] for step, batch in enumerate(batches)]
    assert min(norms) > clip  # all are clipped
    found, begin = trainer.net.state_dict(), load_model("llamagen-mini").transformer.state_dict()
    apart, moved = (
        sum((weights[key] - expected[key]).abs().sum().item() for key in expected)
        for weights in (found, begin)
    )
    assert least * moved <= apart <= most * moved


@pytest.mark.parametrize("is_saved", [False, True])
def test_saving_before_the_first_finite_step_changes_nothing(is_saved, monkeypatch):
    """As after an overflow of float16 in the first step."""
    trainer = Trainer(load_model("llamagen-mini"), config_of("llamagen", "cca"), 8, Ranks())
    before = copy.deepcopy(trainer.net.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "clip", lambda: torch.tensor(torch.inf))
        trainer.optimizer_step(0, batch := random_batch(trainer.model, torch.zeros(8, dtype=torch.bool)))
    if is_saved:
        trainer.state()
    trainer.optimizer_step(1, batch)
    moved = [(value - before[key]).abs().max().item() for key, value in trainer.net.state_dict().items()]
    assert max(moved) == pytest.approx(1e-3, rel=0.06)  # AdamW's first update: the rate, and weight decay


def deep(family: str, rate: float) -> ARImageModel:
    """Ten blocks, more than PyTorch compiles, on few tokens; ``rate`` of stochastic depth or dropout."""
    entry = ZOO[f"{family}-mini"]
    tokenizer = TOKENIZERS[entry.tokenizer].config
    torch.manual_seed(1)
    if family == "var":
        tokenizer = replace(tokenizer, patch_nums=(1, 2, 3))
        sizes = {"dim": 16, "heads": 2, "depth": 10, "drop_path_rate": rate}
    else:
        sizes = {"dim": 16, "heads": 2, "layers": 10, "dropout": rate}
    model = entry.backbone.build(replace(entry.transformer, **sizes), tokenizer, 16)
    model.transformer.init_weights()
    model.tokenizer.requires_grad_(False)
    return model


@pytest.mark.parametrize("family, rate", [("var", 0.3), ("var", 0.0), ("llamagen", 0.1)])
def test_one_compilation_serves_all_blocks(family, rate, monkeypatch):
    """PyTorch gives up after eight; and no later step compiles, though its pairs are fewer.

    Nor do other chunks of the likelihood, of which each pass has a smaller one.
    """
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    own = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: own(module, backend=backend, fullgraph=True))
    compiler = partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(models.log_likelihood, "compiled_function", cache(compiler))
    monkeypatch.setitem(models.utils.precision.LIKELIHOOD_LOGITS, "cpu", 512 * 5)

    def losses(compile: bool) -> list[float]:
        torch._dynamo.reset()
        model, config = deep(family, rate), config_of(family, "cca")
        trainer, found = Trainer(model, config, 4, Ranks(), compile=compile), []
        for step in range(2):
            uncond = torch.arange(8) < step
            pairs = pair_labels(torch.arange(8), uncond, model.null_class)
            tokens = torch.arange(model.sequence_length).expand(8, -1)
            found.append(trainer.optimizer_step(step, Batch(tokens, *pairs, uncond))["loss"])
            # Of a block with gradients, and of the reference without; as many of a chunk, and its gradient.
            assert len(graphs) == (2 + 3 if compile else 0)
        return found

    assert losses(compile=False) == losses(compile=True)


def test_schedule_of_every_micro_step():
    expected = golden("train_trace_var_cca")["lrs"]
    found = [1e-3 * lr_factor(i, 2, 6, 0.1) for i in range(6)]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-9, atol=0)


class InterruptedProcesses(Ranks):
    """SIGTERM arrives just after the n-th sum over the ranks."""

    interrupt_at = sums = 0

    def all_reduce(self, values):
        self.sums += 1
        total = super().all_reduce(values)
        if self.sums == self.interrupt_at:
            signal.raise_signal(signal.SIGTERM)
        return total


def test_no_moment_of_a_step_loses_a_signal(tmp_path):
    def run(interrupt_at: int) -> tuple[list[str], int]:
        model, processes = load_model("var-mini"), InterruptedProcesses()
        config = replace(config_of("var", "cca"), batch_size=2)
        output = Output.run(tmp_path / str(interrupt_at), model.checkpoint_name)
        options = {**config.options(), "model": "var-mini"}
        output.begin({"options": options})
        folder = RunFolder(output.path, processes, options)
        processes.interrupt_at, processes.sums = interrupt_at, 0  # a run listens from its start on
        loader = Loader(ImageArray(Path(TRAIN), model), config, processes, model.null_class)
        train(Trainer(model, config, 2, processes), loader, folder, save_every=100, log_every=100)
        return [state.name for state in (folder.path / "state").iterdir()], processes.sums

    states, sums = run(0)
    assert states == ["step-3"] and sums >= 3
    for interrupt_at in range(1, sums // 3 + 1):  # every sum of the first step
        states, _ = run(interrupt_at)
        assert states in (["step-1"], ["step-2"])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_weights_that_are_not_finite_are_not_exported(ema, tmp_path):
    """The last steps of a run can break the weights after the last finite gradient."""
    config = replace(config_of("var", "cca"), ema=ema)
    trainer = Trainer(build("var_tiny_a"), config, micro_batch_size=4, ranks=Ranks())
    assert trainer.full_weights().keys() == trainer.net.state_dict().keys()
    with torch.no_grad():
        (trainer.ema if ema else dict(trainer.net.named_parameters()))["head.bias"][0] = torch.inf
    with pytest.raises(UserError, match=r"--lr: the trained weights are not finite \(head.bias\)"):
        RunFolder(tmp_path, trainer.ranks, {}).export(trainer)
    assert not list(tmp_path.iterdir())
