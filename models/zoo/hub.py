"""Downloads: weights from the Hugging Face hub, through its cache, and files from any address."""

import os
import re
import shutil
from collections import Counter
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
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, validate_repo_id

from models.utils.errors import UserError
from models.utils.files import causes, existing_part, reason, size_text, writing

HUB = "hf://"  # prefix of the address of a file on the hub
ASSETS = Path(__file__).parents[2] / "assets"


@dataclass(frozen=True)
class Download:
    """A file to download: name, approximate size in bytes, target folder, and the option that needs it."""

    name: str
    size: int
    folder: Path
    option: str


def require_space(downloads: Sequence[Download]) -> None:
    """Raise UserError if a download's folder is not writable or, by the approximate sizes, has no room."""
    needed = Counter[Path]()
    for file in downloads:
        needed[existing_part(file.folder)] += file.size
    for file in downloads:
        folder = existing_part(file.folder)
        free = shutil.disk_usage(folder).free
        message = f"{file.option}: {file.name} must be downloaded"
        if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
            raise UserError(f"{message}, but {folder} is not a writable folder")
        if needed[folder] > free:
            raise UserError(
                f"{message} (~{size_text(needed[folder])} in all), but {folder} has only "
                f"{size_text(free)} free"
            )


@dataclass(frozen=True)
class WeightsFile:
    """A file of a hub repository, or of ``assets/`` if ``repository`` is None.

    revision: a branch, tag or commit; None is the main branch.
    """

    file: str
    repository: str | None = None
    revision: str | None = None

    @classmethod
    def from_address(cls, text: str, option: str) -> "WeightsFile":
        """Parse ``hf://ORG/REPO/FILE[@REVISION]``. Raises UserError for text of another form."""
        match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)/([^@]+)(?:@([^@]+))?", text)
        try:
            validate_repo_id(match[1] if match else "")
        except HFValidationError:
            match = None
        if not match or {"", ".", ".."} & set(match[2].split("/")):
            raise UserError(f"{option}: {text!r} is not hf://ORG/REPO/FILE or hf://ORG/REPO/FILE@REVISION")
        return cls(match[2], match[1], match[3])

    def __str__(self) -> str:
        if self.repository is None:
            return f"assets/{self.file}"
        return f"{self.repository}/{self.file}" + (f"@{self.revision}" if self.revision else "")

    def cached(self) -> Path | None:
        """Return the path of the file if it is on this machine, else None."""
        path = (
            try_to_load_from_cache(self.repository, self.file, revision=self.revision)
            if self.repository
            else str(ASSETS / self.file)
        )
        return Path(path) if isinstance(path, str) and Path(path).exists() else None

    def fetch(self, option: str) -> Path:
        """Return the path of the file; download it first if it is not on this machine.

        ``option`` takes a path from the user and is named in errors. HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE
        have their usual effect. Raises UserError.
        """
        if self.repository is None:
            return ASSETS / self.file
        if path := self.cached():
            return path
        is_reachable = False
        try:
            # Without a network this call fails at once. The download would retry for half a minute.
            get_hf_file_metadata(hf_hub_url(self.repository, self.file, revision=self.revision))
            is_reachable = True
            return Path(hf_hub_download(self.repository, self.file, revision=self.revision))
        except Exception as error:  # the hub's client raises many types of errors
            problem = _refusal(error, get_token())
            is_missing = isinstance(error, (EntryNotFoundError, RepositoryNotFoundError))
            if problem is None and is_missing and not isinstance(error, LocalEntryNotFoundError):
                problem = "the hub has no such file"
            elif problem is None and is_reachable:
                problem = f"the download failed: {reason(error)}"
            elif problem is None:
                problem = "it is not in the cache and the hub is out of reach"
        raise UserError(
            f"{option}: {self}: {problem}; download the file by hand and give its path with {option} PATH"
        )


def _refusal(error: Exception, token: str | None = None) -> str | None:
    """Return why a server refused the request (login, token or rate limit); None for other errors.

    ``token`` is the one that was sent.
    """
    if isinstance(error, GatedRepoError) and not token:
        return "its repository needs a login: accept its terms on the hub, then `hf auth login`"
    statuses = {getattr(getattr(e, "response", None), "status_code", None) for e in causes(error)}
    if statuses & {401, 403} and token:
        return (
            "the hub refuses your token (HF_TOKEN, or that of `hf auth login`): renew it, or give it access"
        )
    if 429 in statuses:
        return "the rate limit is reached (429 Too Many Requests): try again in a few minutes"
    return None


def download(address: str, path: Path, is_whole: Callable[[Path], bool], option: str) -> Path:
    """Return ``path``; download it from ``address`` first if it does not exist.

    An interrupted download leaves a partial file beside ``path``, from which the next download resumes. If
    several processes call this, one downloads and the others wait. huggingface_hub's client does the
    download, so HF_HUB_OFFLINE and its time-outs apply.

    Args:
        is_whole: returns whether a downloaded file is complete and valid.
        option: named in errors.

    Raises:
        UserError: the address is out of reach, the downloaded file is damaged, or it cannot be written.
    """
    if path.exists():
        return path
    try:
        size = get_hf_file_metadata(address, token=False).size
    except Exception as error:  # the client raises many types of errors
        why = _refusal(error) or reason(error)
        raise UserError(
            f"{option}: {address} is out of reach ({why}); download it by hand and save it as {path}"
        ) from None
    part = part_of(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():  # another process may have downloaded it in the meantime
                _download(address, size, part, option)
                if not is_whole(part):
                    part.unlink()
                    raise UserError(
                        f"{option}: {address}: the downloaded file is damaged and was removed; try again"
                    )
                os.replace(part, path)
    return path


def part_of(path: Path) -> Path:
    """Return the path of the partial file of a download of ``path``."""
    return path.with_name(f".{path.name}.part")


def _download(address: str, size: int | None, part: Path, option: str) -> None:
    """Download the rest of the ``size`` bytes at ``address`` and append it to ``part``."""
    if size is not None and part.exists() and part.stat().st_size > size:
        part.unlink()  # it belongs to another file that used to be at this address
    with open(part, "ab") as file:
        try:
            http_get(address, file, resume_size=file.tell(), expected_size=size)
        except Exception as error:  # the client raises many types of errors
            raise UserError(
                f"{option}: {address}: the download was cut off after {file.tell():,} bytes "
                f"({_refusal(error) or reason(error)}); run the same command again to resume it"
            ) from None
