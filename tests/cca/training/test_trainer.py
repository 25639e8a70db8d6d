"""Training steps compared with the published code; compilation, stop signals, non-finite weights."""

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


def make_config(backbone: str, loss: str) -> TrainingConfig:
    is_var = backbone == "var"
    return TrainingConfig(
        loss=loss, beta=0.1, lambda_=10.0, uncond_ratio=0.1, batch_size=8, lr=1e-3, weight_decay=0.05,
        final_weight_decay=None, ema=0.0, grad_clip=2.0 if is_var else 1.0,
        warmup=2 / 6 if is_var else 0.0, final_lr=0.1 if is_var else 1.0,
        schedule_accumulation=2, max_steps=3, seed=0, dtype="float32",
    )  # fmt: skip


@pytest.mark.parametrize("loss", ["cca", "dpo", "unlearning"])
@pytest.mark.parametrize("backbone, model_name", [("var", "var_tiny_a"), ("llamagen", "llamagen_tiny_vq16")])
def test_training_equals_published_trace(backbone, model_name, loss):
    trace = golden(f"train_trace_{backbone}_{loss}")
    trainer = Trainer(build(model_name), make_config(backbone, loss), micro_batch_size=4, ranks=Ranks())
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
    # The published code back-propagates half of each micro-batch's loss and records the whole loss.
    torch.testing.assert_close(
        torch.tensor(micro_losses, dtype=torch.float64), trace["losses"], rtol=0, atol=1e-4
    )
    weights = trainer.model.transformer.state_dict()
    for key, expected in trace.items():
        if key.startswith("final/"):
            torch.testing.assert_close(
                weights[key.removeprefix("final/")].flatten()[:64], expected, rtol=0, atol=1e-5
            )


def train_as_published(model, batches, micro_batch_size: int, config: TrainingConfig, max_norm: float):
    """Train as LlamaGen's trainers do and return the weights.

    The trainers sum the gradients of the micro-batch means, and clip the sum.
    """
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
def test_clip_equals_published_llamagen_trainers(factor, least, most):
    """The published trainers clip the summed gradients of 16 micro-batches at 1. We clip their mean at 1/16.

    After three steps the weights are nearly equal. They differ because AdamW's epsilon is 16 times as large
    relative to our gradients.
    """
    clip, size = ZOO["llamagen-l"].recipes["cca"].grad_clip, 2 * 16
    config = replace(
        make_config("llamagen", "cca"), batch_size=size, lambda_=300.0, grad_clip=factor * clip,
        schedule_accumulation=16,
    )  # fmt: skip
    generator, batches = torch.Generator().manual_seed(0), []
    for _ in range(3):
        uncond = torch.rand(size, generator=generator) < 0.1
        tokens = torch.randint(512, (size, 64), generator=generator)
        pairs = pair_labels(torch.randint(10, (size,), generator=generator), uncond, 10)
        batches.append(Batch(tokens, *pairs, uncond))
    expected = train_as_published(load_model("llamagen-mini"), batches, 2, config, max_norm=1.0)
    trainer = Trainer(load_model("llamagen-mini"), config, 8, Ranks())
    norms = [trainer.optimizer_step(step, batch)["grad_norm"] for step, batch in enumerate(batches)]
    assert min(norms) > clip  # every step is clipped
    found, begin = trainer.net.state_dict(), load_model("llamagen-mini").transformer.state_dict()
    apart, moved = (
        sum((weights[key] - expected[key]).abs().sum().item() for key in expected)
        for weights in (found, begin)
    )
    assert least * moved <= apart <= most * moved


@pytest.mark.parametrize("is_saved", [False, True])
def test_saving_after_skipped_step_changes_nothing(is_saved, monkeypatch):
    """The first step is skipped, as after an overflow in float16."""
    trainer = Trainer(load_model("llamagen-mini"), make_config("llamagen", "cca"), 8, Ranks())
    before = copy.deepcopy(trainer.net.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "clip", lambda: torch.tensor(torch.inf))
        trainer.optimizer_step(0, batch := random_batch(trainer.model, torch.zeros(8, dtype=torch.bool)))
    if is_saved:
        trainer.state()
    trainer.optimizer_step(1, batch)
    moved = [(value - before[key]).abs().max().item() for key, value in trainer.net.state_dict().items()]
    # AdamW's first update is the learning rate, plus weight decay.
    assert max(moved) == pytest.approx(1e-3, rel=0.06)


def build_deep_model(family: str, rate: float) -> ARImageModel:
    """Return a model of ten blocks, more than PyTorch would compile one by one, and few tokens.

    ``rate`` is the rate of stochastic depth (var) or dropout (llamagen).
    """
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
def test_all_blocks_share_one_compilation(family, rate, monkeypatch):
    """The ten blocks compile once, and the second step compiles nothing, although it may have fewer pairs.

    Chunks of the log-likelihood compile once too, although the last chunk of each pass is smaller.
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

    def train_two_steps(compile: bool) -> list[float]:
        torch._dynamo.reset()
        model, config = build_deep_model(family, rate), make_config(family, "cca")
        trainer, found = Trainer(model, config, 4, Ranks(), compile=compile), []
        for step in range(2):
            uncond = torch.arange(8) < step
            pairs = pair_labels(torch.arange(8), uncond, model.null_class)
            tokens = torch.arange(model.sequence_length).expand(8, -1)
            found.append(trainer.optimizer_step(step, Batch(tokens, *pairs, uncond))["loss"])
            # A block: with gradients (policy) and without (reference). A chunk: the same, and its backward.
            assert len(graphs) == (2 + 3 if compile else 0)
        return found

    assert train_two_steps(compile=False) == train_two_steps(compile=True)


def test_learning_rates_equal_published_schedule():
    expected = golden("train_trace_var_cca")["lrs"]
    found = [1e-3 * lr_factor(i, 2, 6, 0.1) for i in range(6)]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-9, atol=0)


class InterruptedRanks(Ranks):
    """Ranks that receive SIGTERM just after call number ``interrupt_at`` of ``all_reduce``."""

    interrupt_at = sums = 0

    def all_reduce(self, values):
        self.sums += 1
        total = super().all_reduce(values)
        if self.sums == self.interrupt_at:
            signal.raise_signal(signal.SIGTERM)
        return total


def test_signal_during_step_is_not_lost(tmp_path):
    def run(interrupt_at: int) -> tuple[list[str], int]:
        model, ranks = load_model("var-mini"), InterruptedRanks()
        config = replace(make_config("var", "cca"), batch_size=2)
        output = Output.run(tmp_path / str(interrupt_at), model.checkpoint_name)
        options = {**config.options(), "model": "var-mini"}
        output.begin({"options": options})
        folder = RunFolder(output.path, ranks, options)
        ranks.interrupt_at, ranks.sums = interrupt_at, 0  # a run handles signals from its start on
        loader = Loader(ImageArray(Path(TRAIN), model), config, ranks, model.null_class)
        train(Trainer(model, config, 2, ranks), loader, folder, save_every=100, log_every=100)
        return [state.name for state in (folder.path / "state").iterdir()], ranks.sums

    states, sums = run(0)
    assert states == ["step-3"] and sums >= 3
    for interrupt_at in range(1, sums // 3 + 1):  # every all_reduce of the first step
        states, _ = run(interrupt_at)
        assert states in (["step-1"], ["step-2"])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_non_finite_weights_are_not_exported(ema, tmp_path):
    """The last update of a run can make weights non-finite, and no later gradient shows it."""
    config = replace(make_config("var", "cca"), ema=ema)
    trainer = Trainer(build("var_tiny_a"), config, micro_batch_size=4, ranks=Ranks())
    assert trainer.full_weights().keys() == trainer.net.state_dict().keys()
    with torch.no_grad():
        (trainer.ema if ema else dict(trainer.net.named_parameters()))["head.bias"][0] = torch.inf
    with pytest.raises(UserError, match=r"--lr: the trained weights are not finite \(head.bias\)"):
        RunFolder(tmp_path, trainer.ranks, {}).export(trainer)
    assert not list(tmp_path.iterdir())
