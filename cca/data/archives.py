"""Archives of images (``.zip`` and ``.tar``) whose members are read without unpacking.

``zipfile`` and ``tarfile`` list the members. The list (the index of an archive) is built once per machine,
with a progress bar. It is stored in the cache folder, and built again when the archive's path, size, inode or
times change.
"""

import copy
import errno
import hashlib
import io
import os
import posixpath
import socket
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

from cca.progress import ProgressBar
from models import UserError
from models.utils.files import (
    cache_folder,
    cache_lock,
    read_cached,
    reason,
    require_regular_file,
    write_cached,
)

SUFFIXES = (".zip", ".tar")
UNSUPPORTED = {
    (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"): "is a compressed tar, of "
    "which single files cannot be read; decompress it (gunzip, bunzip2, unxz, unzstd) and give the .tar",
    (".parquet", ".7z", ".rar"): "is neither a .zip nor a .tar; docs/data.md shows how to make a .zip of it",
}
PLAIN, STORED, DEFLATED, NO_FILE = range(4)  # how a member is stored; NO_FILE: a link or other special file
ZIP_KINDS = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}
BLOCK = 512  # bytes of a block of a tar
INDEX_FORMAT = 1  # changes with the format of a cached index and with the rules that build it
MOST_INFLATED = 1100  # slightly more bytes than deflate can make of one
UTF8 = 0x800  # flag of a .zip member whose name is UTF-8
MOST_PADDING = 2**20  # most bytes of zeros at the end of a tar
# Name, (offset of the data, in a .zip of the header; stored bytes; decompressed bytes; CRC-32; kind).
Member = tuple[str, tuple[int, int, int, int, int]]


class Archive:
    """The files of an archive, or of one folder in it, by name. ``Folder`` has the same methods.

    A tar inside a tar counts as a folder of that name, as in ``ILSVRC2012_img_train.tar``. Forked processes
    may read from one object at the same time: no read uses a shared file position.

    Raises UserError for a file that is not an archive, is cut off, or has members that are encrypted or use a
    compression other than deflate.
    """

    def __init__(self, path: Path):
        self.root, self.prefix = path, ""
        try:
            self._handle = _Handle(require_regular_file(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({reason(error)})") from None
        with os.fdopen(os.dup(self._handle.descriptor), "rb") as file:
            self._names, self._members = read_index(path, file)

    def _part(self) -> range:
        """Return the range of the names below ``root`` in the sorted list of names."""
        if not self.prefix:
            return range(len(self._names))
        return range(
            bisect_left(self._names, self.prefix),
            bisect_left(self._names, f"{self.prefix[:-1]}0"),  # the character after "/"
        )

    def subfolder(self, name: str) -> "Archive | None":
        """Return a subfolder as an archive of its own, or None if it does not exist."""
        inner = copy.copy(self)
        inner.root, inner.prefix = self.root / name, f"{self.prefix}{name}/"
        return inner if inner._part() else None

    def list_files(self) -> tuple[list[str], list[str]]:
        """Return the names of the files below ``root``, sorted, and of entries such as links.

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
        """Return the decompressed size of a file in bytes. Raises OSError if it does not exist."""
        return self._member(name)[2]

    def open(self, name: str) -> io.BytesIO:
        """Return a file's content. Raise OSError if it is missing or damaged (a tar has no checksums)."""
        offset, stored, size, crc, kind = self._member(name)
        if kind in (STORED, DEFLATED):
            header = self._read(30, offset)
            flags, name_bytes, extra_bytes = struct.unpack("<6xH18xHH", header)
            encoding = "utf-8" if flags & UTF8 else "cp437"
            own_name = self._read(name_bytes, offset + 30).decode(encoding, "replace")
            if _zip_path(own_name, flags) != self.prefix + name:
                raise OSError("damaged: its header names another file")
            offset += 30 + name_bytes + extra_bytes
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
            piece = os.pread(self._handle.descriptor, count - len(data), offset + len(data))
            if not piece:
                raise OSError("the archive is cut off")
            data += piece
        return data


class _Handle:
    """An open file that closes when no archive object uses it any more."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.descriptor)


def find_archive(path: Path) -> tuple[Path, str] | None:
    """Split ARCHIVE/FOLDER: return the archive and the folder in it ("" if the path has none).

    Return None if no part of the path is an archive. Raises UserError for unsupported kinds of archives.
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
    """Return the index of an archive: sorted names [N], and int64 [N, 5] (see ``Member``)."""
    status, real_path = os.fstat(file.fileno()), os.path.realpath(path)
    stamp = (INDEX_FORMAT, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    key, place = f"{real_path}\n{stamp}", f"{socket.gethostname()}\n{real_path}"
    # Nodes may share the cache folder and have an archive of their own at the same path.
    cache = cache_folder() / "archives" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.npz"
    # One rank builds the index, the others read it. The cache folder may not be writable.
    with suppress(OSError), cache_lock(cache):
        if (index := _cached_index(read_cached(cache), key)) is None:
            index = _build_index(path, file)
            with suppress(UserError):  # if the disk is full, the next command builds the index again
                write_cached(cache, _index_arrays(key, *index))
        return index
    return _build_index(path, file)


def _cached_index(arrays: dict[str, np.ndarray], key: str) -> tuple[list[str], np.ndarray] | None:
    """Return the index that ``_index_arrays`` made, or None if it is of another ``key``."""
    if arrays.keys() != {"key", "names", "members"} or bytes(arrays["key"]) != os.fsencode(key):
        return None
    names = bytes(arrays["names"]).decode("utf-8", "surrogateescape")
    return names.split("\0") if names else [], arrays["members"]


def _index_arrays(key: str, names: list[str], members: np.ndarray) -> dict[str, np.ndarray]:
    """Return an index as arrays; the names are one text."""
    as_bytes = os.fsencode(key), "\0".join(names).encode("utf-8", "surrogateescape")
    key_array, name_array = (np.frombuffer(text, np.uint8) for text in as_bytes)
    return {"key": key_array, "names": name_array, "members": members}


def _build_index(path: Path, file: BinaryIO) -> tuple[list[str], np.ndarray]:
    names, numbers, size = list[str](), array("q"), os.fstat(file.fileno()).st_size
    list_members = _list_zip if path.name.lower().endswith(".zip") else _list_tar
    options = {"unit": "B", "unit_scale": True, "leave": False, "delay": 1}
    with ProgressBar(total=size, desc=f"index of {path.name}", **options) as bar:
        try:
            for name, member in list_members(path, file):
                if member[0] + member[1] > size or member[2] > MOST_INFLATED * member[1]:
                    raise UserError(f"{path}: is cut off or damaged: {name} does not fit in the archive")
                names.append(name)
                numbers.extend(member)
                bar.update(max(member[0] - bar.n, 0))
        except (UserError, MemoryError):
            raise
        except Exception as error:  # both libraries raise some ten kinds of errors for damaged files
            raise UserError(f"{path}: is not a readable archive ({reason(error)})") from None
    order = sorted(range(len(names)), key=names.__getitem__)
    # If a name occurs twice, its last entry counts, as when the archive is unpacked.
    order = [i for i, after in zip(order, [*order[1:], -1]) if after < 0 or names[i] != names[after]]
    members = np.frombuffer(numbers, np.int64).reshape(-1, 5)[order]
    return [names[i] for i in order], members


def _plain_path(name: str) -> str:
    """Return a member's path without "./" and "/"."""
    return posixpath.normpath(name).lstrip("/")


def _zip_path(name: str, flags: int) -> str:
    """Return the path of a member of a .zip, whose name was decoded as ``flags`` say.

    Without the UTF-8 flag that is code page 437. Info-ZIP's ``zip`` writes UTF-8 and does not set the flag.
    """
    if not flags & UTF8:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return _plain_path(name)


def _list_zip(path: Path, file: BinaryIO) -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.is_dir():
                continue
            if entry.flag_bits & 1 or entry.compress_type not in ZIP_KINDS:
                raise UserError(
                    f"{path}: {entry.filename} is encrypted, or its compression is not "
                    "deflate; create the archive again with zip -0 -r"
                )
            is_link = stat.S_ISLNK(entry.external_attr >> 16)
            kind = NO_FILE if is_link else ZIP_KINDS[entry.compress_type]
            name = _zip_path(entry.filename, entry.flag_bits)
            yield name, (entry.header_offset, entry.compress_size, entry.file_size, entry.CRC, kind)


def _list_tar(path: Path, file: BinaryIO, folder: str = "", end: int | None = None) -> Iterator[Member]:
    """Yield the members of the tar between the file position and byte ``end`` (default: end of file)."""
    end = os.fstat(file.fileno()).st_size if end is None else end
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while entry := tar.next():
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every member in memory
            name = folder + _plain_path(entry.name)
            is_hidden = posixpath.basename(name).startswith(".")  # what macOS puts beside files, among others
            if entry.isreg() and name.lower().endswith(".tar") and entry.size and not is_hidden:
                file.seek(entry.offset_data)
                yield from _list_tar(path, file, f"{name[:-4]}/", entry.offset_data + entry.size)
            elif not entry.isdir():
                kind = PLAIN if entry.isreg() and not entry.issparse() else NO_FILE
                yield name, (entry.offset_data, entry.size, entry.size, 0, kind)
        # tarfile stops without an error at a damaged or missing header.
        file.seek(tar.offset)
        padding = file.read(min(end - tar.offset, MOST_PADDING)) if tar.offset < end else b""
        if len(padding) < BLOCK or any(padding) or end - tar.offset > MOST_PADDING:
            raise UserError(
                f"{path}: is cut off or damaged, or is several archives in one: "
                f"the last readable header ends at byte {tar.offset:,}, the archive at {end:,}"
            )
