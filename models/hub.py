"""Weights files: bundled in ``assets/``, or on the Hugging Face hub behind its ordinary cache."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from models.errors import UserError

ASSETS = Path(__file__).parent.parent / "assets"


def hub_page(repository: str, file: str, kind: str = "blob") -> str:
    """Address of the hub's page of a file ("blob") or folder ("tree"), or of a file itself ("resolve")."""
    return f"https://huggingface.co/{repository}/{kind}/main/{file}"


def downloaded(path: Path) -> bool:
    """Whether a path leads into the hub's cache."""
    return path.is_relative_to(constants.HF_HUB_CACHE)


@dataclass(frozen=True)
class WeightsFile:
    """A file of a hub repository, or of ``assets/`` where ``repository`` is None."""

    file: str
    repository: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}/{self.file}" if self.repository else f"assets/{self.file}"

    @property
    def page(self) -> str | None:
        """Address of the hub's page of the file; None where it is bundled."""
        return hub_page(self.repository, self.file) if self.repository else None

    @property
    def address(self) -> str | None:
        """Address of the file itself; None where it is bundled."""
        return hub_page(self.repository, self.file, "resolve") if self.repository else None

    def cached(self) -> Path | None:
        """The file if it is on this machine already."""
        found = (
            try_to_load_from_cache(self.repository, self.file) if self.repository else str(ASSETS / self.file)
        )
        return Path(found) if isinstance(found, str) and Path(found).exists() else None

    def fetch(self, option: str) -> Path:
        """Path of the file, downloaded if need be; ``option`` is where a user may give a path.

        HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE work as everywhere. Raises UserError.
        """
        if self.repository is None:
            return ASSETS / self.file
        try:
            if not constants.HF_HUB_OFFLINE and not self.cached():
                self._reach(self.repository)
            return Path(hf_hub_download(self.repository, self.file))
        except LocalEntryNotFoundError:
            reason = "it is not in the cache and the hub is out of reach"
        except (EntryNotFoundError, RepositoryNotFoundError):
            reason = "the hub has no such file"
        except (
            Exception
        ) as error:  # the hub's client lets many kinds through: HTTP, file system, consistency checks
            reason = f"the download failed: {' '.join(str(error).split())[:120]}"
        raise UserError(
            f"{option}: {self}: {reason}; fetch that file by hand and give its path with {option} PATH"
        )

    def _reach(self, repository: str) -> None:
        """Raise LocalEntryNotFoundError at once without a network: the download tries for half a minute."""
        try:
            get_hf_file_metadata(hf_hub_url(repository, self.file), timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except HfHubHTTPError:
            pass  # an answer: the download deals with it
        except Exception as error:
            raise LocalEntryNotFoundError(str(error)) from None
