"""Add a backbone, a loss, a metric and a data format as CONTRIBUTING.md describes.

The backbone is one class and its rows in the zoo. scripts/reproduce.py trains, samples and evaluates it. No
other code changes.
"""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from commands import metrics
from torch import nn

import eval_fid
from cca.data.datasets import LabelledDataset, open_labelled_images
from cca.evaluation.evaluator import METRICS, Metric
from cca.losses import LOSSES, Loss
from cca.training.options import training_parser
from cca.training.setup import run_training
from models import ZOO, load_model
from models.base import ARImageModel, ARTransformer, ImageTokenizer
from models.sampling import DecodingState, SamplingOptions
from models.transforms import RandomCrop
from models.zoo.checkpoint_formats import save_published
from models.zoo.hub import WeightsFile
from models.zoo.registry import TOKENIZERS, Recipe, TokenizerEntry, ZooEntry
from scripts import reproduce

SIDE, GREYS, CLASSES = 4, 8, 3


@dataclass
class ToyState(DecodingState):
    labels: torch.Tensor

    def keep_rows(self, rows):
        self.labels = self.labels[:rows]


class Table(ARTransformer):
    """One vector per class and position, from which the output layer computes logits; tokens are not used."""

    def __init__(self, width):
        super().__init__()
        self.vectors = nn.Embedding(CLASSES + 1, SIDE * SIDE * width)
        self.head = nn.Linear(width, GREYS)

    def transformer_blocks(self):
        return nn.ModuleList()

    def hidden(self, labels, inputs):
        return self.vectors(labels).unflatten(1, (SIDE * SIDE, -1))

    def output_layer(self):
        return self.head

    def init_weights(self):
        nn.init.normal_(self.vectors.weight)


class Pixels(ImageTokenizer):
    """Tokenizer whose tokens are the grey levels of pixels."""

    def encode(self, images):
        return ((images.mean(1).flatten(1) + 1) / 2 * (GREYS - 1)).round().long()

    def decode(self, tokens):
        images = tokens.float().view(-1, 1, SIDE, SIDE) / (GREYS - 1) * 2 - 1
        return images.expand(-1, 3, -1, -1)


class Toy(ARImageModel[ToyState]):
    family = "toy"
    default_cfg_schedule = "constant"
    checkpoint_name, checkpoint_key = "model.pt", "state_dict"
    decodes_in_half_precision = False
    training_command = "train_var_cca"
    trains_on_codes = False
    lr_scales_with_batch = False

    def __init__(self, width):
        super().__init__()
        self.transformer, self.tokenizer = Table(width), Pixels()
        self.num_classes, self.vocab_size, self.image_size = CLASSES, GREYS, SIDE
        self.step_sizes = (6, 10)

    @classmethod
    def build(cls, transformer, tokenizer, image_size):
        return cls(transformer)

    def training_transform(self):
        return RandomCrop(SIDE)

    def inputs(self, tokens):
        return tokens

    def begin(self, labels):
        return ToyState(labels)

    def step_inputs(self, state, decoding_step, tokens):
        start = tokens.shape[1]
        return self.transformer.hidden(state.labels, tokens)[
            :, start : start + self.step_sizes[decoding_step]
        ]

    def block_arguments(self, state, decoding_step):
        return []

    def step_logits(self, state, x):
        return self.transformer.to_logits(x)

    def to_uint8(self, images):
        return ((images + 1) * 127.5).round().to(torch.uint8)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Add the model to the zoo; write random weights, and images whose grey level depends on the class."""
    recipe = Recipe(beta=0.5, lambda_=1.0, lr=0.03, batch_size=16, grad_clip=10.0, dtype="float32", epochs=20)
    monkeypatch.setitem(TOKENIZERS, "pixels", TokenizerEntry(Toy, None, None))
    base, recipes = {SIDE: WeightsFile("base.pt")}, {"cca": recipe, "hinge": recipe}
    monkeypatch.setitem(ZOO, "toy", ZooEntry(Toy, 16, "pixels", base, recipes, default_image_size=SIDE))
    monkeypatch.setattr("models.zoo.hub.ASSETS", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator, labels = np.random.default_rng(0), np.arange(96) % CLASSES
    images = generator.integers(0, 40, (96, SIDE, SIDE), np.uint8) + (80 * labels[:, None, None]).astype(
        np.uint8
    )
    np.savez(tmp_path / "images.npz", arr_0=images, arr_1=labels)
    torch.manual_seed(0)
    save_published(Toy(16).transformer.state_dict(), tmp_path / "base.pt", Toy.checkpoint_key)
    return tmp_path


def train(folder, run, *options, open_data=open_labelled_images, data="images.npz"):
    """Train the toy model and return the metrics of its run."""
    fixed = ["--model", "toy", "--data", data, "--output", str(run)]
    parser = training_parser("toy", Toy.training_command, "--data", "images")
    run_training(parser.parse_args([*fixed, *options]), folder / data, open_data)
    return metrics(run)


def test_new_backbone_runs_in_all_commands(toy):
    """scripts/reproduce.py runs the commands for its table of FIDs."""
    images, folder = str(toy / "images.npz"), toy / "out"
    where = ["--data", images, "--reference", images, "--output", str(folder), "--nproc", "1"]
    reproduce.main(["tables", "--mini", "--models", "toy", "--num-samples", "100", *where])
    first, *_, last = metrics(folder / "toy-cca")
    assert last["loss"] < 0.6 * first["loss"] and last["rewards/margins"] > 0.5
    assert torch.load(folder / "toy-cca/model.pt", weights_only=True).keys() == {"state_dict"}
    rows = (line.split(" | ") for line in (folder / "tables.md").read_text().splitlines() if " | " in line)
    fids = {label.strip("| "): fid for label, fid, *_ in rows}
    # The best FID is bold.
    own, base = (
        float(fids[row].strip("*")) for row in ("CCA trained here, no guidance", "base, no guidance")
    )
    assert own < base
    assert "base, guidance 2" in fids


def test_generation_follows_teacher_forcing(toy):
    model, labels = load_model("toy"), torch.arange(CLASSES)
    tokens = model.generate(labels, torch.rand(CLASSES, SIDE * SIDE), SamplingOptions(top_k=1))
    assert torch.equal(tokens, model.logits(labels, tokens).argmax(-1))
    assert torch.equal(model.encode(model.decode(tokens)), tokens)


def test_new_loss_with_own_negatives(toy, monkeypatch):
    """The loss is a hinge on the margin. The negative class is the class after the true one."""
    seen = []

    def hinge_loss(reward, negative_reward, same_label, beta, lambda_):
        seen.append(same_label)
        return (1 - beta * (reward - negative_reward)).clamp(min=0)[~same_label].mean()

    hinge = Loss(hinge_loss, negatives=lambda labels: (labels + 1) % CLASSES)
    monkeypatch.setitem(LOSSES, "hinge", hinge)
    first, *_, last = train(toy, toy / "run", "--loss", "hinge", "--uncond-ratio", "0", "--max-steps", "30")
    assert not any(same.any() for same in seen)  # with rolled labels, some pairs share their class
    assert last["rewards/accuracies"] == 1
    assert last["rewards/margins"] > first["rewards/margins"] + 0.5


def test_new_metric(toy, monkeypatch):
    def brightness(compared):
        return float(compared.samples.pooled.mean()) if compared.labels is not None else None

    monkeypatch.setitem(METRICS, "brightness", Metric(brightness))
    samples, result = str(toy / "images.npz"), toy / "result.json"
    options = ["--reference", samples, "--features", "mini", "--output", str(result)]
    eval_fid.main(["--samples", samples, *options, "--metrics", "brightness,fid"])
    assert set(json.loads(result.read_text())["metrics"]) == {"brightness", "fid"}
    result.unlink()
    with np.load(samples) as file:
        np.savez(toy / "unlabelled.npz", arr_0=file["arr_0"])
    eval_fid.main(["--samples", str(toy / "unlabelled.npz"), *options])
    report = json.loads(result.read_text())
    assert "brightness" not in report["metrics"]
    assert any(note.startswith("brightness is left out") for note in report["notes"])


class TextFile(LabelledDataset):
    """Data set of a text file. A line is an image: its class, then its grey levels."""

    def __init__(self, path, model, seed):
        rows = torch.from_numpy(np.loadtxt(path, dtype=np.int64))
        self.all_labels, self.all_tokens = rows[:, 0], rows[:, 1:]

    def item(self, epoch, index):
        return self.all_tokens[index]


def test_new_data_format(toy):
    with np.load(toy / "images.npz") as file:
        levels = (file["arr_0"].reshape(96, -1) / 255 * (GREYS - 1)).round().astype(int)
        np.savetxt(toy / "images.txt", np.c_[file["arr_1"], levels], fmt="%d")
    expected = train(toy, toy / "npz", "--max-steps", "5")
    found = train(toy, toy / "txt", "--max-steps", "5", open_data=TextFile, data="images.txt")
    assert [m["loss"] for m in found] == pytest.approx([m["loss"] for m in expected], rel=1e-5)
