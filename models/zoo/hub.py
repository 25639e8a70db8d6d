"""Files from the network: weights from the Hugging Face hub, behind its cache, and files of any address."""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, validate_repo_id

from models.utils.errors import UserError
from models.utils.files import causes, existing_part, reason, size_text, writing

HUB = "hf://"  # begins the address of any file on the hub
ASSETS = Path(__file__).parents[2] / "assets"


@dataclass(frozen=True)
class Download:
    """A file that will be fetched: its name, about how many bytes, where to, and by which option's wish."""

    name: str
    size: int
    folder: Path
    option: str


def space_needed(downloads: Sequence[Download]) -> dict[Path, int]:
    """Return the bytes that downloads need, by the existing folder that they go to."""
    needed: dict[Path, int] = {}
    for file in downloads:
        folder = existing_part(file.folder)
        needed[folder] = needed.get(folder, 0) + file.size
    return needed


def require_space(downloads: Sequence[Download]) -> None:
    """Raise UserError where what is to be downloaded cannot be put, or does not fit, as far as is known."""
    needed = space_needed(downloads)
    for file in downloads:
        folder = existing_part(file.folder)
        free = shutil.disk_usage(folder).free
        wanted = f"{file.option}: {file.name} is to be downloaded"
        if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
            raise UserError(f"{wanted}, {folder} is no folder that may be written to")
        if needed[folder] > free:
            raise UserError(f"{wanted} (~{size_text(file.size)}), {folder} has {size_text(free)} free")


@dataclass(frozen=True)
class WeightsFile:
    """A file of a hub repository, or of ``assets/`` where ``repository`` is None.

    revision: a branch, tag or commit; None is the main branch.
    """

    file: str
    repository: str | None = None
    revision: str | None = None

    @classmethod
    def from_address(cls, text: str, option: str) -> "WeightsFile":
        """Return the file of ``hf://ORG/REPO/FILE[@REVISION]``. Raises UserError for another form."""
        found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)/([^@]+)(?:@([^@]+))?", text)
        try:
            validate_repo_id(found[1] if found else "")
        except HFValidationError:
            found = None
        if not found or {"", ".", ".."} & set(found[2].split("/")):
            raise UserError(f"{option}: {text!r} is not hf://ORG/REPO/FILE or hf://ORG/REPO/FILE@REVISION")
        return cls(found[2], found[1], found[3])

    def __str__(self) -> str:
        if self.repository is None:
            return f"assets/{self.file}"
        return f"{self.repository}/{self.file}" + (f"@{self.revision}" if self.revision else "")

    def cached(self) -> Path | None:
        """The file if it is on this machine already."""
        found = (
            try_to_load_from_cache(self.repository, self.file, revision=self.revision)
            if self.repository
            else str(ASSETS / self.file)
        )
        return Path(found) if isinstance(found, str) and Path(found).exists() else None

    def fetch(self, option: str) -> Path:
        """Path of the file, downloaded if need be; ``option`` is where a user may give a path.

        HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE work as everywhere. Raises UserError.
        """
        if self.repository is None:
            return ASSETS / self.file
        if path := self.cached():
            return path
        reached = False
        try:
            # Without a network this ends at once, where the download would try for half a minute.
            get_hf_file_metadata(hf_hub_url(self.repository, self.file, revision=self.revision))
            reached = True
            return Path(hf_hub_download(self.repository, self.file, revision=self.revision))
        except (EntryNotFoundError, RepositoryNotFoundError):
            problem = "the hub has no such file"
        except Exception as error:  # the hub's client lets many kinds through
            out_of_reach = "it is not in the cache and the hub is out of reach"
            problem = f"the download failed: {reason(error)}" if reached else out_of_reach
            problem = _refusal(error) or problem
        raise UserError(
            f"{option}: {self}: {problem}; fetch that file by hand and give its path with {option} PATH"
        )


def _refusal(error: Exception) -> str | None:
    """Return why a server refused a token or too many requests; None for other errors."""
    statuses = {getattr(getattr(e, "response", None), "status_code", None) for e in causes(error)}
    if statuses & {401, 403} and get_token():
        return (
            "the hub refuses your token (HF_TOKEN, or that of `hf auth login`): renew it, or give it access"
        )
    if 429 in statuses:
        return "the rate limit is reached (429 Too Many Requests): try again in some minutes"
    return None


def download(address: str, path: Path, is_whole: Callable[[Path], bool], option: str) -> Path:
    """Return ``path``, downloaded from ``address`` if nothing is there.

    A download that was cut off leaves its part beside ``path``, and the next one resumes from it. Of several
    processes one downloads, the others wait for it. HF_HUB_OFFLINE and the time-outs of huggingface_hub,
    whose client does the work, hold here too.

    Args:
        is_whole: looks into what was downloaded.
        option: named in errors.

    Raises:
        UserError: the address is out of reach, what it gives is not whole, or nothing can be written.
    """
    if path.exists():
        return path
    try:
        size = get_hf_file_metadata(address, token=False).size
    except Exception as error:  # the client lets many kinds through
        why = _refusal(error) or reason(error)
        raise UserError(
            f"{option}: {address} is out of reach ({why}); fetch it by hand and put it at {path}"
        ) from None
    part = part_of(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():  # no other process has downloaded it meanwhile
                _download(address, size, part, option)
                if not is_whole(part):
                    part.unlink()
                    raise UserError(
                        f"{option}: {address}: what was downloaded is damaged; it was removed, try again"
                    )
                os.replace(part, path)
    return path


def part_of(path: Path) -> Path:
    """Where a download of ``path`` lies until it is whole."""
    return path.with_name(f".{path.name}.part")


def _download(address: str, size: int | None, part: Path, option: str) -> None:
    """Append to ``part`` what it lacks of the ``size`` bytes at ``address``."""
    if size is not None and part.exists() and part.stat().st_size > size:
        part.unlink()  # of another file, which was there before
    with open(part, "ab") as file:
        try:
            http_get(address, file, resume_size=file.tell(), expected_size=size)
        except Exception as error:  # the client lets many kinds through
            raise UserError(
                f"{option}: {address}: the download was cut off after {file.tell():,} bytes "
                f"({_refusal(error) or reason(error)}); the same command resumes it"
            ) from None
