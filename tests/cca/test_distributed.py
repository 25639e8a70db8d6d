"""Shares, sums and gathers over real processes (gloo), and alone."""

import torch
from commands import run

from cca.distributed import Processes

COLLECTIVES = """
import torch
from cca.distributed import Processes
processes = Processes()
rows = torch.arange(7)[processes.share(7)]
values = torch.tensor([float(processes.rank), 1.0])
total = processes.sum(values)
assert total is values and total.tolist() == [3.0, 3.0]
gathered = processes.gather(torch.stack([rows, rows**2], 1))
assert (gathered is not None) == processes.main
if processes.main:
    assert torch.equal(gathered, torch.stack([torch.arange(7), torch.arange(7) ** 2], 1))
processes.barrier()
"""


def test_three_processes(tmp_path):
    (tmp_path / "collectives.py").write_text(COLLECTIVES)
    run(tmp_path / "collectives.py", processes=3, PYTHONPATH=".")


def test_shares_cover_everything_once():
    alone = Processes()
    assert alone.main and alone.share(5) == slice(0, 5)
    for count in (0, 1, 7, 100):
        shares = []
        for alone.rank in range(3):
            alone.world = 3
            shares.append(alone.share(count))
        assert [i for share in shares for i in range(share.start, share.stop)] == list(range(count))
        sizes = [share.stop - share.start for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_alone_nothing_is_exchanged():
    values = torch.ones(2)
    assert Processes().sum(values) is values and Processes().gather(values) is values
