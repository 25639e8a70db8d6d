"""Images that cannot be read: how many of them a command bears, and what it notes to be resumed."""

import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from cca.data.datasets import LabelledDataset
from cca.data.image_folders import FileList, Folder
from cca.distributed import Ranks
from models import UserError

NOTED = "unreadable"  # in config.json and in the codes' header; not compared on resuming
SHARE = 0.001  # of all images; beyond it, and beyond one image, the command stops


class Unreadable:
    """Images that another one of their class stands in for, since they cannot be read.

    ``noted`` is what the output keeps of all that there were since it was begun, by name: what the
    fingerprint saw of the file (see ``FileList.resume``), and whether what is made holds the other image.
    ``counted`` are names of those that could not be read in this run of the command.

    Raises UserError where too many of those that were noted before still cannot be read.
    """

    def __init__(self, data: LabelledDataset, ranks: Ranks):
        self.data, self.ranks = data, ranks
        self.source = data.source or FileList(Folder(Path()), [])
        self.noted, self.places = dict(self.source.noted), self.source.places()
        self.new: set[int] = set()  # indices that this rank has not shared with the others
        self.counted = set(
            ranks.broadcast_from_rank0(lambda: [n for n, index in self.places.items() if data[0, index][1]])
        )
        self.check()

    @property
    def too_many(self) -> bool:
        return len(self.counted) > max(1, SHARE * len(self.data))

    def add(self, indices: Iterable[int]) -> dict[str, dict]:
        """Note and count images that could not be read; return what is noted of those that are new."""
        names = {self.source.keys[index]: index for index in sorted(indices)}
        found = {
            name: {**self.source.seen(index), "replaced": True}
            for name, index in names.items()
            if name not in self.counted
        }
        self.noted |= found
        self.counted |= found.keys()
        return found

    def report(self, names: Iterable[str]) -> None:
        for name in names:
            line = f"unreadable, replaced by another image of its class: {self.source.root}/{name}"
            tqdm.write(line, file=sys.stderr)

    def share(self) -> None:
        """Make what the ranks could not read one set; all ranks take part."""
        own = sorted(self.new)
        rounds = range(max(self.ranks.all_gather(len(own))))
        of_all = {index for i in rounds for index in self.ranks.all_gather([*own, *[-1] * len(rounds)][i])}
        found = self.add(of_all - {-1})
        self.new.clear()
        if self.ranks.is_main:
            self.report(found)

    def check(self) -> None:
        """Raise UserError if too many images cannot be read."""
        if self.too_many:
            counts = f"{len(self.counted)} of {len(self.data)} images cannot be read"
            raise UserError(
                f"--data: {counts}, more than {SHARE:.1%} and more than one, such as {self.source.root}/"
                f"{min(self.counted)}; mend them without removing any, and the same command goes on"
            )
