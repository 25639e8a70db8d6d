"""The batch script without a scheduler: with a fake srun, scontrol and torchrun, and signals of the test."""

import json
import os
import signal
import subprocess

import pytest
from commands import REFERENCE, ROOT, TRAIN, environment, lines, wait_until
from made_data import make_picture
from rehearsal import rehearse

SRUN = """#!/usr/bin/env bash
# Runs its command once for each node; SIGUSR1 goes to these tasks, and to none of their children.
while [[ $1 == --* ]]; do shift; done
tasks=()
trap 'kill -USR1 $(jobs -p)' USR1
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
status=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2> /dev/null; do wait "$task"; done
    wait "$task" || status=$?
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ "$*" == "show hostnames first,second" ]]; then echo first; echo second
elif [[ "$*" == "show hostnames localhost" ]]; then echo localhost
else echo "$*" >> scontrol.txt; fi
"""
# Each call starts one rank, which ends at once. In training it runs until SIGTERM, unless "second" exists.
TORCHRUN = """#!/usr/bin/env bash
echo "$@" >> calls.txt
[[ "$*" != *fails* ]] || exit 3
[[ "$*" == *train_* && ! -e second ]] || exit 0
bash -c 'trap "echo saved >> saved.txt; exit 0" TERM; echo > "started-$PPID"; while :; do sleep 0.05; done' &
wait
"""


@pytest.fixture
def start(tmp_path):
    """Return a function that starts the job in ``tmp_path`` as SLURM does, with environment variables."""
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": TORCHRUN}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("imagenet", "VIRTUAL_imagenet256_labeled.npz"):
        (tmp_path / name).touch()

    def start(nodes="localhost", **variables):
        job = {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": nodes,
            "SLURM_JOB_NUM_NODES": str(nodes.count(",") + 1),
            "VENV": str(tmp_path),
        }
        return subprocess.Popen(
            ["bash", ROOT / "scripts" / "slurm.sbatch"],
            cwd=tmp_path,
            env=environment(**job | variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start


def send_warning(process, ready):
    """Send the scheduler's warning when ``ready`` returns True, and return what the job printed."""
    try:
        wait_until(process, ready)
        process.send_signal(signal.SIGUSR1)
        return process.communicate(timeout=600)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_end(process, status=0):
    """Wait until the job ends with this exit status, and return what it printed."""
    text = process.communicate(timeout=600)[0]
    assert process.returncode == status, text
    return text


@pytest.mark.parametrize("model", ["var-d16", "llamagen-l"])
def test_warning_saves_and_requeues_once(model, start, tmp_path, monkeypatch):
    job = {"nodes": "first,second", "MODEL": model, "TRAINING": "--epochs 2 --ema 0.9"}
    process = start(**job)
    text = send_warning(process, lambda: len(list(tmp_path.glob("started-*"))) == 2)
    assert process.returncode == 0, text
    assert lines(tmp_path / "saved.txt") == ["saved"] * 2
    assert lines(tmp_path / "scontrol.txt") == ["requeue 4711"]
    calls = lines(tmp_path / "calls.txt")
    assert "train_" in calls[-1] and "--epochs 2 --ema 0.9" in calls[-1]
    assert not any("sample.py" in call for call in calls)

    (tmp_path / "second").touch()
    wait_for_end(start(**job))
    assert lines(tmp_path / "scontrol.txt") == ["requeue 4711"]
    again = lines(tmp_path / "calls.txt")[len(calls) :]
    names = ["train_var_cca.py", "sample.py", "eval_fid.py"]
    if model == "llamagen-l":
        names = ["scripts.extract_codes", "train_llamagen_cca.py", *names[1:]]
    assert len(again) == 2 * len(names)
    for call, name in zip(again, [name for name in names for _ in range(2)], strict=True):
        assert name in call and "--nnodes 2 " in call and "--rdzv-endpoint first:" in call
    assert sum("is_host=1" in call for call in again) == sum("is_host=0" in call for call in again)

    (tmp_path / "imagenet").unlink()
    for i in range(256):
        make_picture(tmp_path / "imagenet" / "n01440764" / f"{i}.png", size=(8, 8))
    monkeypatch.chdir(tmp_path)
    for call in again[::2]:
        rehearse(f"torchrun {call}")


def test_failed_step_ends_the_job(start, tmp_path):
    wait_for_end(start(MODEL="var-d16", TRAINING="--fails"), status=1)
    assert len(lines(tmp_path / "calls.txt")) == 1 and not (tmp_path / "scontrol.txt").exists()


@pytest.mark.parametrize("variable", ["DATA", "REFERENCE", "VENV"])
def test_missing_path_is_an_error(variable, start, tmp_path):
    text = wait_for_end(start(**{variable: "missing"}), status=2)
    assert text.startswith("error: missing") and text.count("\n") == 1
    assert not (tmp_path / "calls.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["var", "llamagen"])
def test_real_commands_with_mini_model(kind, start, tmp_path):
    """The job gets the warning while it trains, and resumes in its second run."""
    for name in ("train_var_cca.py", "train_llamagen_cca.py", "sample.py", "eval_fid.py", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    number = {"var": "4711", "llamagen": "4811"}[kind]  # it sets the port, and both cases may run at once
    job = {
        "SLURM_JOB_ID": number,
        "MODEL": f"{kind}-mini", "DATA": str(ROOT / TRAIN), "REFERENCE": str(ROOT / REFERENCE),
        "OUTPUT": "run", "TRAINING": "--batch-size 8 --max-steps 200 --save-every 1000",
        "SAMPLING": "--num-samples 16",
        "EVALUATION": "--features mini", "PROCESSES": "1", "VENV": str(ROOT / ".venv"),
        "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }  # fmt: skip
    process = start(**job)
    text = send_warning(process, lambda: len(lines(tmp_path / "run" / "metrics.jsonl")) >= 2)
    steps = len(lines(tmp_path / "run" / "metrics.jsonl"))
    assert process.returncode == 0 and 2 <= steps < 200, text
    assert f"stopped after step {steps}, " in text
    assert lines(tmp_path / "scontrol.txt") == [f"requeue {number}"]
    assert [path.name for path in (tmp_path / "run" / "state").iterdir()] == [f"step-{steps}"]

    wait_for_end(start(**job))
    assert lines(tmp_path / "scontrol.txt") == [f"requeue {number}"]
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 200
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["samples"]["count"] == 16 and evaluation["metrics"]["fid"] > 0
