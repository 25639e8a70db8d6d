"""Ranks and their collectives, in several processes (gloo) and in one."""

import re
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from commands import call, finish, run, start_processes

from cca.distributed import Ranks, StopRequest
from models.utils.errors import UserError

COLLECTIVES = """
import torch
from cca.distributed import Ranks
processes = Ranks()
rows = torch.arange(7)[processes.share(7)]
values = torch.tensor([float(processes.rank), 1.0])
total = processes.all_reduce(values)
assert total is values and total.tolist() == [3.0, 3.0]
assert processes.all_gather("ü" * processes.rank) == ["", "ü", "üü"]
assert processes.broadcast_from_rank0(lambda: [processes.rank]) == [0]
gathered = processes.gather(torch.stack([rows, rows**2], 1))
assert (gathered is not None) == processes.is_main
if processes.is_main:
    assert torch.equal(gathered, torch.stack([torch.arange(7), torch.arange(7) ** 2], 1))
processes.barrier()
"""


# Python calls the functions of atexit in reverse order, so `show` runs last. Building a model imports
# torch.compile's modules.
AT_EXIT = """
import atexit, os
from pathlib import Path
def gloo_threads():
    return [path for path in Path("/proc/self/task").glob("*/comm") if "gloo" in path.read_text()]
atexit.register(lambda: os._exit(3) if gloo_threads() else None)
from cca.distributed import Ranks
from models.zoo.loading import build_model
processes = Ranks()
assert gloo_threads()
build_model("llamagen-mini")
processes.barrier()
"""


# Simulates one visible GPU per rank; this machine has none.
ONE_GPU = """
import os, sys, types
import torch
import torch.distributed as dist
from cca.cli.main import run_command
from cca.distributed import Ranks
start = dist.init_process_group
dist.init_process_group = lambda backend: start("gloo")
gpu = types.SimpleNamespace(uuid="GPU-0" if sys.argv[1] == "shared" else f"GPU-{os.environ['RANK']}")
answers = dict(is_available=True, device_count=1, set_device=None, get_device_properties=gpu)
for name, answer in answers.items():
    setattr(torch.cuda, name, lambda *_, answer=answer: answer)
run_command(lambda: print("on GPU", Ranks().device.index))
"""


def test_collectives_of_three_ranks(tmp_path):
    (tmp_path / "collectives.py").write_text(COLLECTIVES)
    run(tmp_path / "collectives.py", processes=3, PYTHONPATH=".")


def test_gloo_threads_end_before_exit(tmp_path):
    """A gloo thread that frees a tensor while Python ends would abort the process."""
    (tmp_path / "at_exit.py").write_text(AT_EXIT)
    run(tmp_path / "at_exit.py", processes=2, PYTHONPATH=".")


def test_host_collectives_use_cpu_tensors(monkeypatch):
    """Rank 0 of 2 is simulated: its collectives are replaced, and a tensor on the GPU would fail."""
    backends, device_types = [], []
    properties = SimpleNamespace(uuid="GPU-1")
    answers = {
        "is_available": True, "device_count": 2, "set_device": None, "get_device_properties": properties
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr("atexit.register", lambda function: None)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", backends.append)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: device_types.append(tensor.device.type))
    monkeypatch.setattr(dist, "all_gather_object", lambda values, own: values.__setitem__(1, None))
    ranks, done = Ranks(), []
    assert ranks.device.type == "cuda" and backends == ["cpu:gloo,cuda:nccl"]
    assert ranks.all_reduce_numbers(1.5, 2**24 + 1) == [1.5, 2**24 + 1]
    assert ranks.any_rank(True) and not ranks.any_rank(False)
    assert ranks.run_or_abort_all(lambda: done.append(True), True, 3.0) == [3.0] and done
    assert ranks.digest(lambda: "abc") == "abc"
    ranks.barrier()
    assert len(device_types) >= 5 and set(device_types) == {"cpu"}


@pytest.mark.parametrize("shared", [False, True])
def test_single_visible_gpu_is_used_unless_shared(tmp_path, shared):
    (tmp_path / "one_gpu.py").write_text(ONE_GPU)
    line = [tmp_path / "one_gpu.py", "shared" if shared else "own"]
    for status, printed, errors in finish(start_processes(line, [tmp_path] * 2)):
        assert (status, printed) == ((2, "") if shared else (0, "on GPU 0\n")), errors
        assert ("error: LOCAL_RANK: ranks [0, 1] share GPUs" in errors) == shared


def test_gpu_without_free_memory_is_refused(monkeypatch):
    def raise_oom(device):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", raise_oom)
    with pytest.raises(UserError, match="^CUDA_VISIBLE_DEVICES: GPU 0 has no free memory"):
        Ranks()


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"RANK": "1"}, "RANK: the environment variable is 1; expected less than WORLD_SIZE"),
        ({"RANK": "one"}, "RANK: the environment variable is 'one'; expected"),
        ({"RANK": "-1"}, "RANK: the environment variable is '-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: the environment variable is '0'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: the environment variable is not set"),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "RANK: the environment variable is not set",
        ),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK: the environment variable is ''"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS: srun started 8"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
            "MASTER_ADDR: the 2 ranks cannot connect at localhost:x",
        ),
    ],
)
def test_invalid_torchrun_variables_are_refused(variables, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(message)):
        Ranks()


MEET = """
import os, time
from types import SimpleNamespace
import cca.cli.main
from cca.distributed import Ranks
cca.cli.main.time = SimpleNamespace(sleep=lambda seconds: time.sleep(60 * seconds))
cca.cli.main.run_command(lambda: Ranks().barrier() or print(os.environ["GLOO_SOCKET_IFNAME"]))
"""


def test_network_interface_of_gloo(tmp_path):
    """Gloo uses the network interface that is set for NCCL; without it, gloo would choose one itself.

    With an unknown interface, rank 0 prints the error, and rank 1 waits until torchrun ends it. Here rank 1
    waits 60 times as long as usual. With a valid one, the barrier keeps each rank until the other arrives.
    """
    (tmp_path / "meet.py").write_text(MEET)
    found = run(tmp_path / "meet.py", processes=2, PYTHONPATH=".", NCCL_SOCKET_IFNAME="lo")
    assert found.stdout.splitlines().count("lo") == 2  # older versions of gloo also print lines
    result = call([tmp_path / "meet.py"], 2, PYTHONPATH=".", GLOO_SOCKET_IFNAME="none0")
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: GLOO_SOCKET_IFNAME: ")
    assert "none0" in line


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    with StopRequest():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, before)


REFUSAL = """
from cca.distributed import Ranks
from cca.cli.main import run_command
from models.utils.errors import UserError
processes = Ranks()
def refuse():
    if processes.rank == 1:
        raise UserError("no room")
run_command(lambda: WORK)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "work", ["processes.run_or_abort_all(refuse)", "refuse() or processes.all_reduce_numbers(1)"]
)
def test_error_on_one_rank_stops_all_ranks(work, tmp_path):
    (tmp_path / "refusal.py").write_text(REFUSAL.replace("WORK", work))
    result = call([tmp_path / "refusal.py"], 2, PYTHONPATH=".")
    assert result.returncode != 0 and "RuntimeError" not in result.stderr
    assert [line for line in result.stderr.splitlines() if "error: no room" in line] == ["error: no room"]
