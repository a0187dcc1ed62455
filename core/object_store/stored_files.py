"""Reads files in constant memory: local ones, in a bucket or at any other fsspec URL."""

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import fsspec
import google_crc32c
import zstandard

from core.base.endpoints import is_loopback
from core.base.errors import RunError, UsageError
from core.base.redaction import redact
from core.object_store import ObjectInfo, ObjectStore, open_store

_CHUNK_BYTES = 1 << 20
# The output of one decompress call is in memory at once, and may be ten thousand times as large.
_COMPRESSED_CHUNK_BYTES = 1 << 12
_ZSTD_LONGEST_WINDOW = 1 << 31
_CLEAR_SCHEMES = ("http", "ftp", "ws", "webhdfs", "webdav")


def is_file(path: str) -> bool:
    """Whether `path` is an existing file."""
    if _in_bucket(path):
        store, name = _bucket_object(path)
        return store.info(name) is not None
    fs, location = filesystem(path)
    return fs.isfile(location)


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a path or URL, and the path inside it. Raises UsageError for an unknown protocol."""
    _refuse_unsafe_url(path)
    try:
        return fsspec.core.url_to_fs(path, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{path}: {error}") from error


def _refuse_unsafe_url(path: str) -> None:
    """Raises UsageError for an unencrypted URL, and for one with a password, which would end up in logs and records."""
    for scheme, host in re.findall(r"(?:^|::)([A-Za-z][A-Za-z0-9+.-]*)://([^/:]*(?::[^/:]*)*)", path):
        shown = redact(path)
        if scheme.lower() in _CLEAR_SCHEMES and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            raise UsageError(f"{shown}: {scheme} is for loopback only: use https, gs:// or a local copy")
        if "@" in host:
            raise UsageError(f"{shown}: leave user and password out of the URL, use the environment or ~/.netrc")


def _in_bucket(path: str) -> bool:
    return path.startswith(("gs://", "gcs://"))


def _bucket_object(path: str) -> tuple[ObjectStore, str]:
    """Through the store, which reads one generation of an object and retries failed and stalled requests; gcsfs does
    neither."""
    folder, _, name = path.rpartition("/")
    return open_store(folder), name


def _open_stored(path: str) -> BinaryIO:
    if _in_bucket(path):
        store, name = _bucket_object(path)
        return store.open(name)
    fs, location = filesystem(path)
    return fs.open(location, "rb")


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turns any exception of a filesystem into a RunError that starts with `what`.

    Object stores raise errors of their HTTP and login libraries, which share no base class but Exception.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"{what}: {str(error) or type(error).__name__}") from error


def read_lines(path: str) -> Iterator[bytes]:
    """The unchanged lines of a plain, .gz or .zst file, without a byte order mark.

    Raises RunError naming the file and the line if it cannot be read to its end.
    """
    line = 0
    try:
        with _open_stored(path) as stored, _decompressed(stored, path) as lines:
            for raw in lines:
                yield raw.removeprefix(b"\xef\xbb\xbf") if line == 0 else raw
                line += 1
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise RunError(f"{path}: damaged or cut off after line {line} ({error}): make or copy it again") from error
    except Exception as error:
        raise RunError(f"{path}: cannot read on after line {line}: {str(error) or type(error).__name__}") from error


def read_jsonl_lines(path: str) -> Iterator[bytes]:
    """`read_lines` without the blank lines at the end; other blank lines become empty, so that positions stay."""
    blank_lines = 0
    for raw in read_lines(path):
        if not raw.strip():
            blank_lines += 1
            continue
        for _ in range(blank_lines):
            yield b""
        blank_lines = 0
        yield raw


def _decompressed(stored: BinaryIO, path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=stored)  # type: ignore[return-value]
    raw = _ZstdReader(stored) if path.endswith(".zst") else stored
    return io.BufferedReader(cast(io.RawIOBase, raw), _CHUNK_BYTES)


class _ZstdReader(io.RawIOBase):
    """Zstandard frames as one stream of bytes. The package's own reader does not detect a truncated frame."""

    def __init__(self, stored: BinaryIO) -> None:
        self._stored = stored
        self._pending = memoryview(b"")
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending and self._decompress_next():
            pass
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def _decompress_next(self) -> bool:
        between_frames = self._frame is None or self._frame.eof
        left_over = self._frame.unused_data if self._frame is not None and between_frames else b""
        compressed = left_over or self._stored.read(_COMPRESSED_CHUNK_BYTES)
        if not compressed and between_frames:
            return False
        if not compressed:
            raise EOFError("the last zstandard frame is incomplete")
        if between_frames:
            self._frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_LONGEST_WINDOW).decompressobj()
        self._pending = memoryview(self._frame.decompress(compressed))
        return True


def stored_info(path: str) -> ObjectInfo:
    """Size and checksum of a file: a bucket stores them, other files are read."""
    if _in_bucket(path):
        store, name = _bucket_object(path)
        found = store.info(name)
        if found is None:
            raise FileNotFoundError("it is gone")
        return found
    size = 0
    checksum = google_crc32c.Checksum()
    with _open_stored(path) as stored:
        while chunk := stored.read(_CHUNK_BYTES):
            size += len(chunk)
            checksum.update(chunk)
    return ObjectInfo(size, checksum.digest().hex())
