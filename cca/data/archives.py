"""Archives of images, ``.zip`` and ``.tar``, whose members are read in place.

``zipfile`` and ``tarfile`` list the members. The index of a file is built once per machine, with a progress
bar, and is kept in the cache folder under the archive's path, size and time of change.
"""

import copy
import errno
import hashlib
import io
import os
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from huggingface_hub.utils import WeakFileLock

from cca.progress import ProgressBar
from models import UserError
from models.utils.files import cache_folder, reason, require_regular_file, write_binary

SUFFIXES = (".zip", ".tar")
UNSUPPORTED = {
    (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"): "a compressed tar has no places "
    "to read images from; decompress it once (gunzip, bunzip2, unxz, unzstd) and give the .tar",
    (".parquet", ".7z", ".rar"): "is neither a .zip nor a .tar; docs/data.md shows how to make a .zip of it",
}
PLAIN, STORED, DEFLATED, NO_FILE = range(4)  # how a member lies in its archive; NO_FILE: links and the like
ZIP_KINDS = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}
BLOCK = 512  # bytes: the unit of a tar
MOST_PADDING = 2**20  # bytes of zeros that end a tar
# A member: its name; where it begins (in a .zip its header), bytes there, bytes of the file, CRC-32, kind.
Member = tuple[str, tuple[int, int, int, int, int]]


class Archive:
    """The files of an archive, or of one folder in it, by name. ``Folder`` has the same methods.

    A tar inside a tar is a folder of its name, as in ``ILSVRC2012_img_train.tar``. Forked processes may read
    the same object at once: no read depends on a shared position in the file.

    Raises UserError for a file that is no archive, ends early, or has members that are encrypted or
    compressed by another method than deflate.
    """

    def __init__(self, path: Path):
        self.root, self.prefix = path, ""
        try:
            self._descriptor = os.open(require_regular_file(path), os.O_RDONLY)  # open until the process ends
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({reason(error)})") from None
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            self._names, self._members = read_index(path, file)

    def _part(self) -> range:
        """Return the places below ``root`` in the list of names."""
        if not self.prefix:
            return range(len(self._names))
        return range(
            bisect_left(self._names, self.prefix),
            bisect_left(self._names, f"{self.prefix[:-1]}0"),  # the character after "/"
        )

    def subfolder(self, name: str) -> "Archive | None":
        """Return a folder of this one as an archive of its own; None where there is none."""
        inner = copy.copy(self)
        inner.root, inner.prefix = self.root / name, f"{self.prefix}{name}/"
        return inner if inner._part() else None

    def list_files(self) -> tuple[list[str], list[str]]:
        """Return the files below ``root``, ascending, and what is no file, such as links.

        Hidden entries are skipped.
        """
        files, others, part = list[str](), list[str](), self._part()
        for place, kind in zip(part, self._members[part.start : part.stop, 4].tolist()):
            name = self._names[place][len(self.prefix) :]
            if "/." not in f"/{name}":
                (others if kind == NO_FILE else files).append(name)
        return files, others

    def is_file(self, name: str) -> bool:
        try:
            return self._member(name)[4] != NO_FILE
        except FileNotFoundError:
            return False

    def size(self, name: str) -> int:
        """Return the bytes of a file, decompressed. Raises OSError where there is none."""
        return self._member(name)[2]

    def open(self, name: str) -> io.BytesIO:
        """Return a file's content. Raises OSError for a missing or damaged one (a tar has no checksums)."""
        offset, stored, size, crc, kind = self._member(name)
        if kind in (STORED, DEFLATED):
            header = self._read(30, offset)
            offset += 30 + sum(struct.unpack("<HH", header[26:]))  # its name and an extra field
        data = self._read(stored, offset)
        if kind == DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error as error:
                raise OSError(f"damaged: {error}") from None
        if len(data) != size or (kind != PLAIN and zlib.crc32(data) != crc):
            raise OSError("damaged: its length or checksum is wrong")
        return io.BytesIO(data)

    def _member(self, name: str) -> list[int]:
        name = self.prefix + name
        place = bisect_left(self._names, name)
        if place == len(self._names) or self._names[place] != name:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return self._members[place].tolist()

    def _read(self, count: int, offset: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = os.pread(self._descriptor, count - len(data), offset + len(data))
            if not piece:
                raise OSError("the archive ends early")
            data += piece
        return data


def find_archive(path: Path) -> tuple[Path, str] | None:
    """Return the archive that a path names, and the folder inside it that follows ("": none).

    None where the path names no archive.
    Raises UserError for archives of other kinds.
    """
    for place in (path, *path.parents):
        if os.path.isdir(place):
            return None
        if os.path.isfile(place):
            name = place.name.lower()
            for suffixes, problem in UNSUPPORTED.items():
                if name.endswith(suffixes):
                    raise UserError(f"{place}: {problem}")
            inside = path.relative_to(place).as_posix()
            return (place, "" if inside == "." else inside) if name.endswith(SUFFIXES) else None
    return None


def read_index(path: Path, file: BinaryIO) -> tuple[list[str], np.ndarray]:
    """Return an archive's members: names [N], ascending, and their numbers int64 [N, 5] (see ``Member``)."""
    status, place = os.fstat(file.fileno()), os.path.realpath(path)
    key = f"{place}\n{status.st_size}\n{status.st_mtime_ns}"
    kept = cache_folder() / "archives" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.npz"
    with suppress(OSError):  # there may be no place to keep it
        kept.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(kept.with_suffix(".lock")):  # one rank builds it, the others read it
            if (found := _kept_index(kept, key)) is None:
                found = _build_index(path, file)
                _keep_index(kept, key, *found)
            return found
    return _build_index(path, file)


def _kept_index(kept: Path, key: str) -> tuple[list[str], np.ndarray] | None:
    try:
        with open(kept, "rb") as file, np.load(file, allow_pickle=False) as content:
            if bytes(content["key"]) == os.fsencode(key):
                names = bytes(content["names"]).decode("utf-8", "surrogateescape")
                return names.split("\0") if names else [], content["members"]
    except Exception:  # missing, or damaged in one of numpy's many ways
        return None
    return None


def _keep_index(kept: Path, key: str, names: list[str], members: np.ndarray) -> None:
    as_bytes = (os.fsencode(key), "\0".join(names).encode("utf-8", "surrogateescape"))
    key_bytes, name_bytes = (np.frombuffer(text, np.uint8) for text in as_bytes)
    with suppress(UserError):  # no room: it is built again next time
        write_binary(kept, lambda to: np.savez(to, key=key_bytes, names=name_bytes, members=members))


def _build_index(path: Path, file: BinaryIO) -> tuple[list[str], np.ndarray]:
    names, numbers, size = list[str](), array("q"), os.fstat(file.fileno()).st_size
    list_members = _list_zip if path.name.lower().endswith(".zip") else _list_tar
    with ProgressBar(total=size, desc=f"index of {path.name}", unit="B", unit_scale=True, leave=False) as bar:
        try:
            for name, member in list_members(path, file):
                names.append(posixpath.normpath(name).lstrip("/"))
                numbers.extend(member)
                bar.update(max(member[0] - bar.n, 0))
        except (UserError, MemoryError):
            raise
        except Exception as error:  # both libraries raise some ten kinds for damaged files
            raise UserError(f"{path}: is no readable archive ({reason(error)})") from None
    order = sorted(range(len(names)), key=names.__getitem__)
    # Of a name that occurs twice the last one counts, as when the archive is unpacked.
    order = [i for i, after in zip(order, [*order[1:], -1]) if after < 0 or names[i] != names[after]]
    members = np.frombuffer(numbers, np.int64).reshape(-1, 5)[order]
    return [names[i] for i in order], members


def _list_zip(path: Path, file: BinaryIO) -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.is_dir():
                continue
            if entry.flag_bits & 1 or entry.compress_type not in ZIP_KINDS:
                raise UserError(
                    f"{path}: {entry.filename} is encrypted, or compressed by another method than "
                    "deflate; make the archive again (zip -0 -r)"
                )
            is_link = stat.S_ISLNK(entry.external_attr >> 16)
            kind = NO_FILE if is_link else ZIP_KINDS[entry.compress_type]
            yield entry.filename, (entry.header_offset, entry.compress_size, entry.file_size, entry.CRC, kind)


def _list_tar(path: Path, file: BinaryIO, folder: str = "", end: int | None = None) -> Iterator[Member]:
    """List the tar that begins at the file's position and has to end before ``end`` (None: the file's)."""
    end = os.fstat(file.fileno()).st_size if end is None else end
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while entry := tar.next():
            tar.members = []  # type: ignore[attr-defined]  # which would hold all that it has seen
            name = folder + entry.name
            if entry.isreg() and name.lower().endswith(".tar"):
                file.seek(entry.offset_data)
                yield from _list_tar(path, file, f"{name[:-4]}/", entry.offset_data + entry.size)
            elif not entry.isdir():
                kind = PLAIN if entry.isreg() and not entry.issparse() else NO_FILE
                yield name, (entry.offset_data, entry.size, entry.size, 0, kind)
        # tarfile ends without a word where a header is damaged or missing.
        file.seek(tar.offset)
        padding = file.read(min(end - tar.offset, MOST_PADDING)) if tar.offset < end else b""
        if len(padding) < BLOCK or any(padding) or end - tar.offset > MOST_PADDING:
            raise UserError(
                f"{path}: is cut off or damaged, or several archives in one: "
                f"its list of files ends at byte {tar.offset:,}, the archive at {end:,}"
            )
