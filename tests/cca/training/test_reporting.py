"""Metrics go to TensorBoard, to Weights & Biases or nowhere; a resumed run continues its W&B run."""

import importlib.util
import sys

import pytest
from commands import TRAIN, call, expect_error, metrics

import train_var_cca
from cca.training.reporting import WandB
from models import UserError

OPTIONS = [
    "--model",
    "var-mini",
    "--data",
    TRAIN,
    "--batch-size",
    "4",
    "--max-steps",
    "3",
    "--save-every",
    "2",
]
STOPS = """
import sys, train_var_cca
from cca.training.trainer import Trainer
step = Trainer.optimizer_step
def stopped(trainer, done, batch):
    if done == 2:
        sys.exit(3)
    return step(trainer, done, batch)
Trainer.optimizer_step = stopped
train_var_cca.main(sys.argv[1:])
"""


def test_resume_continues_wandb_run(tmp_path):
    pytest.importorskip("wandb", reason="pip install -r requirements-wandb.txt")
    options, run = [*OPTIONS, "--report-to", "wandb", "--output", tmp_path / "run"], tmp_path / "run"
    variables = {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    assert call(["-c", STOPS, *options], **variables).returncode == 3
    finished = call(["train_var_cca.py", *options], **variables)
    assert finished.returncode == 0, finished.stderr
    run_id = (run / "wandb" / "run-id").read_text()
    first, second = sorted((run / "wandb").glob(f"offline-run-*-{run_id}"))
    logged = metrics(run)
    for part, rows in ((first, logged[:2]), (second, logged[2:])):
        content = (part / f"run-{run_id}.wandb").read_bytes()
        assert rows and all(name.encode() in content for row in rows for name in row.keys() - {"step"})
    assert not (run / "tensorboard").exists()


def test_wandb_without_api_key_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install -r requirements-wandb.txt")
    for name, value in {"WANDB_MODE": "online", "HOME": str(tmp_path), "WANDB_API_KEY": ""}.items():
        monkeypatch.setenv(name, value)
    line = ["train_var_cca.py", *OPTIONS, "--report-to", "wandb", "--output", tmp_path / "run"]
    expect_error(line, "--report-to: Weights & Biases", "API key")
    assert not (tmp_path / "run").exists()


def test_run_survives_wandb_failure(tmp_path, capsys):
    """The W&B service may be killed. The run continues and prints a single warning."""
    reporter, calls = WandB.__new__(WandB), []

    class BrokenRun:
        def log(self, metrics, step):
            calls.append(step)
            raise ConnectionResetError("Connection lost")

    reporter.run = BrokenRun()
    for step in (1, 2):
        reporter.log(step, {"loss": 1.0})
    assert calls == [1] and capsys.readouterr().err.count("warning: Weights & Biases gets no more") == 1


def test_missing_wandb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match=r"^--report-to: wandb .* pip install -r requirements-wandb.txt"):
        train_var_cca.main([*OPTIONS, "--report-to", "wandb", "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_report_to_none(tmp_path):
    train_var_cca.main([*OPTIONS, "--report-to", "none", "--output", str(tmp_path / "run")])
    assert len(metrics(tmp_path / "run")) == 3
    assert not {"tensorboard", "wandb"} & {path.name for path in (tmp_path / "run").iterdir()}
