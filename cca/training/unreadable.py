"""Images that cannot be read: how many a command tolerates, and what it records about them for a resume."""

import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from cca.data.datasets import LabelledDataset
from cca.data.image_folders import FileList, Folder
from cca.distributed import Ranks
from models import UserError

NOTED = "unreadable"  # entry of config.json and of the codes' header; not compared on resume
SHARE = 0.001  # of all images; with more than this share and more than one image, the command stops


class Unreadable:
    """The images that cannot be read. Another image of the same class replaces each of them.

    noted: what the output records about every such image, by name: what the fingerprint saw of the file (see
        ``FileList.resume``), and whether the output contains the replacement.
    counted: names of the images that could not be read in this run of the command.
    new: indices that this rank has not shared with the others yet.

    Raises:
        UserError: too many of the images recorded earlier still cannot be read.
    """

    def __init__(self, data: LabelledDataset, ranks: Ranks):
        self.data, self.ranks = data, ranks
        self.source = data.source or FileList(Folder(Path()), [])
        self.noted, self.places = dict(self.source.saved_records), self.source.places()
        self.new: set[int] = set()
        self.counted = set(
            ranks.broadcast_from_rank0(lambda: [n for n, index in self.places.items() if data[0, index][1]])
        )
        self.check()

    @property
    def too_many(self) -> bool:
        return len(self.counted) > max(1, SHARE * len(self.data))

    def add(self, indices: Iterable[int]) -> dict[str, dict]:
        """Record and count images that could not be read; return the records of those that are new."""
        names = {self.source.keys[index]: index for index in sorted(indices)}
        records = {
            name: {**self.source.record(index), "replaced": True}
            for name, index in names.items()
            if name not in self.counted
        }
        self.noted |= records
        self.counted |= records.keys()
        return records

    def report(self, names: Iterable[str]) -> None:
        """Print a warning for each of these images."""
        for name in names:
            path = f"{self.source.root}/{name}"
            line = f"warning: {path}: unreadable, replaced by another image of its class"
            tqdm.write(line, file=sys.stderr)

    def share(self) -> None:
        """Add the ``new`` images of all ranks on every rank. All ranks take part."""
        records = self.add(set[int]().union(*self.ranks.all_gather(self.new)))
        self.new.clear()
        if self.ranks.is_main:
            self.report(records)

    def check(self) -> None:
        """Raise UserError if too many images cannot be read."""
        if self.too_many:
            counts = f"{len(self.counted)} of {len(self.data)} images cannot be read"
            raise UserError(
                f"--data: {counts}, for example {self.source.root}/{min(self.counted)}; at most {SHARE:.1%} "
                "of the images, or one, may be unreadable. Repair the files, remove none, then run the same "
                "command again to resume"
            )
