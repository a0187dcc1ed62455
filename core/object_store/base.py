"""The interface of object stores, and the values that they take and return."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import google_crc32c

from core.base.errors import RunError


class Created(enum.Enum):
    """The outcome of a create-only write. Only CREATED means that this call wrote the object."""

    CREATED = "created"
    ALREADY_SAME = "already same"
    ALREADY_DIFFERENT = "already different"


@dataclass(frozen=True)
class ObjectInfo:
    """Size in bytes and CRC32C (Castagnoli) as 8 lower-case hex digits."""

    size: int
    crc32c: str


@dataclass(frozen=True)
class Entry:
    """An object in a listing.

    Attributes:
      modified: seconds since 1970 by the storage's clock.
      version: changes whenever the object is written again.
    """

    name: str
    size: int
    modified: float
    version: str


@dataclass(frozen=True)
class Listing:
    """Objects sorted by name, and the time by the storage's clock (on a disk: this machine's)."""

    entries: tuple[Entry, ...]
    now: float


@dataclass(frozen=True)
class RetryPolicy:
    """How often to retry one request to a bucket: at most `tries` tries, with exponential backoff and jitter."""

    tries: int = 10
    base_s: float = 1.0
    cap_s: float = 32.0
    connect_timeout_s: float = 15.0
    read_timeout_s: float = 60.0
    write_timeout_s: float = 300.0

    def delay_s(self, failures: int) -> float:
        """Seconds to wait after this many failures: half to all of base * 2^(failures - 1), at most cap."""
        return min(self.cap_s, self.base_s * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)


class ObjectStore(Protocol):
    """A folder of objects. Names are relative, with `/` between their parts."""

    url: str
    """The root, without a trailing slash."""

    def create_bytes(self, name: str, data: bytes) -> Created:
        """Create an object unless the name is taken; if it is, read the existing object and compare."""

    def create_file(self, name: str, local_path: Path, info: ObjectInfo) -> Created:
        """Create an object from a finished local file of that size and checksum, unless the name is taken."""

    def replace_bytes(self, name: str, data: bytes) -> None:
        """Write or overwrite in one step. For derived files only."""

    def read_bytes(self, name: str) -> bytes:
        """The whole object, checked against its stored checksum where there is one. FileNotFoundError if absent."""

    def open(self, name: str) -> BinaryIO:
        """The object as a seekable stream, for reading. FileNotFoundError if absent."""

    def info(self, name: str) -> ObjectInfo | None:
        """Size and checksum: computed by reading a local file, taken from the metadata in a bucket. None if absent."""

    def list(self, prefix: str = "") -> list[str]:
        """Every name that starts with `prefix`, at any depth, sorted; never from a cache, never a temporary file."""

    def listing(self, prefix: str = "") -> Listing:
        """What `list` names, with sizes, times and versions, at the same cost in a bucket."""

    def delete(self, name: str) -> None:
        """Remove an object; it need not exist."""

    def free_bytes(self) -> int | None:
        """Free bytes on the disk; None where there is no such limit."""


def file_info(path: Path) -> ObjectInfo:
    """Size and CRC32C of a local file, read in a stream."""
    with open(path, "rb") as file:
        return stream_info(file)


def bytes_info(data: bytes) -> ObjectInfo:
    """Size and CRC32C of bytes in memory."""
    return ObjectInfo(len(data), f"{google_crc32c.value(data):08x}")


def stream_info(file: BinaryIO) -> ObjectInfo:
    """Size and CRC32C of the rest of a stream."""
    size = crc = 0
    while chunk := file.read(4 << 20):
        size += len(chunk)
        crc = google_crc32c.extend(crc, chunk)
    return ObjectInfo(size, f"{crc:08x}")


def check_name(name: str) -> str:
    """The name itself; ValueError for one that could leave its store."""
    if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
        raise ValueError(f"{name!r} is not an object name: it must be relative, without empty, `.` or `..` parts")
    return name


def check_size(path: Path, info: ObjectInfo) -> None:
    """RunError if a finished file does not have the size that was written; FileNotFoundError if it is gone."""
    size = path.stat().st_size
    if size != info.size:
        raise RunError(f"{path} has {size} bytes where {info.size} were written; remove it and run again")
