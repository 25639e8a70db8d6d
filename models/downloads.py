"""A file at a public address, downloaded into a cache once: resumed, checked, by one process at a time."""

import glob
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfFileMetadata, get_hf_file_metadata
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock

from models.errors import UserError
from models.files import reason, writing
from models.plan import Download, require_space

RESTARTS = 3


class _Part(io.BufferedWriter):
    """A file that is appended to. The client empties it where a server sends no parts of files, as often
    as it likes: a server that always cuts off would keep it busy for ever."""

    restarts = 0

    def truncate(self, size: int | None = None) -> int:
        self.restarts += 1
        if self.restarts > RESTARTS:
            raise ConnectionError("the server cannot resume, and never sent all")
        return super().truncate(size)


def fetch(address: str, path: Path, is_whole: Callable[[Path], bool], option: str) -> Path:
    """``path``, downloaded from ``address`` if nothing is there.

    A download that was cut off left its part beside ``path``, and goes on from there if the file is the
    same still and the server can. Of several processes one downloads, the others wait for it.
    ``is_whole`` looks into what was downloaded; ``option`` is named in errors. HF_HUB_OFFLINE and the
    timeouts of huggingface_hub, whose client does the work, hold here too.

    Raises:
        UserError: the address is out of reach, what it gives is not whole, or nothing can be written.
    """
    if path.exists():
        return path
    by_hand = f"fetch it by hand and put it at {path}"
    try:
        found = get_hf_file_metadata(address, token=False)
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise UserError(f"{option}: {address}: the server answers with status {status}; {by_hand}") from None
    except Exception as error:  # the client lets many kinds through
        raise UserError(f"{option}: {address} is out of reach ({reason(error)}); {by_hand}") from None
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():  # no other process has downloaded it meanwhile
                _download(address, found, path, is_whole, option)
    return path


def begun(path: Path) -> int:
    """Bytes that a download of ``path`` which was cut off has left."""
    return sum(part.stat().st_size for part in _parts(path))


def _parts(path: Path) -> list[Path]:
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.part"))


def _download(
    address: str, found: HfFileMetadata, path: Path, is_whole: Callable[[Path], bool], option: str
) -> None:
    version = hashlib.sha256(f"{found.etag} {found.size}".encode()).hexdigest()[:12]
    part = path.with_name(f".{path.name}.{version}.part")
    for other in _parts(path):
        if other != part:  # of a file that has changed there since
            other.unlink()
    with _Part(io.FileIO(part, "ab")) as file:
        have, size = file.tell(), found.size
        if size is not None:
            require_space([Download(address, size - have, path.parent, option)])
        try:
            http_get(
                address,
                file,
                resume_size=have,
                headers={"If-Range": f'"{found.etag}"'} if found.etag else None,
                expected_size=size,
                displayed_filename=path.name,
            )
        except Exception as error:  # the client lets many kinds through
            if isinstance(error, OSError) and error.errno is not None:
                raise
            file.flush()
            done = part.stat().st_size
            if size is not None and done >= size:
                part.unlink()  # it cannot be gone on with
            of = "" if size is None else f" of {size:,}"
            raise UserError(
                f"{option}: {address}: the download was cut off after {done:,}{of} bytes "
                f"({reason(error)}); the same command goes on from there if the server can"
            ) from None
    if not is_whole(part):
        part.unlink()
        raise UserError(
            f"{option}: {address}: what was downloaded is damaged, or another file; it was removed, try again"
        )
    os.replace(part, path)
