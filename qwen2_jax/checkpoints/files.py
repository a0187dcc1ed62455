"""The bytes of a model's files, by ranges: on the local disk, or at any URL that fsspec knows.

Nothing is mapped into memory: pages of a mapped file would count as ours for as long as they stay.
"""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import google_crc32c
import numpy as np
from jaxtyping import UInt8

from core.base.endpoints import emulator_url
from core.base.errors import ModelError, reading

_BLOCK = 8 << 20
_TRIES = 5
_LARGE = 64 << 20
_SETTLED_NS = 2_000_000_000
_T = TypeVar("_T")


class ByteFile(Protocol):
    """One file of a model. `url` is what messages call it."""

    @property
    def name(self) -> str: ...

    @property
    def url(self) -> str: ...

    @property
    def size(self) -> int: ...

    def __hash__(self) -> int: ...

    def read(self, start: int, stop: int) -> UInt8[np.ndarray, " n"]:
        """Bytes start..stop-1. Raises `ModelError` when they are not there or cannot be read."""
        ...

    def crc32c(self) -> str:
        """CRC32C (Castagnoli) of the whole file, 8 lower-case hex digits."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file of the local disk, as it was when it was looked up."""

    path: Path
    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> LocalFile:
        """Raises `ModelError` when there is no such file."""
        with reading(path):
            stat = path.stat()
        return cls(path, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)

    @property
    def name(self) -> str:
        """Without the folder."""
        return self.path.name

    @property
    def url(self) -> str:
        """The path."""
        return str(self.path)

    def read(self, start: int, stop: int) -> UInt8[np.ndarray, " n"]:
        """See `ByteFile`."""
        out = np.empty(stop - start, np.uint8)
        left = memoryview(out.data)
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            while left:
                count = os.preadv(file.fileno(), [left], stop - len(left))
                if not count:
                    raise EndOfFileError(self.url, stop)
                left = left[count:]
        return out

    def crc32c(self) -> str:
        """See `ByteFile`. A large file is read once and then not again until it changes, by no later run either."""
        if self.size < _LARGE:
            return self._compute_crc32c()
        known = self._known_checksum()
        with contextlib.suppress(OSError):
            if re.fullmatch("[0-9a-f]{8}", found := known.read_text()):
                return found
        found = self._compute_crc32c()
        # A file may change twice within one tick of its time stamps; one that is older has not.
        if time.time_ns() - max(self.mtime_ns, self.ctime_ns) > _SETTLED_NS:
            with contextlib.suppress(OSError):  # a home that cannot be written to only costs time
                known.parent.mkdir(parents=True, exist_ok=True)
                draft = known.with_suffix(f".{os.getpid()}")
                draft.write_text(found)
                draft.replace(known)
        return found

    def _known_checksum(self) -> Path:
        """Where the checksum is cached, under a key that changes with the file."""
        identity = [str(self.path.absolute()), self.size, self.inode, self.mtime_ns, self.ctime_ns]
        return cache_folder("checksums") / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def _compute_crc32c(self) -> str:
        checksum = google_crc32c.Checksum()
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                checksum.update(block)
        return checksum.hexdigest().decode()


def cache_folder(kind: str) -> Path:
    """Where this package keeps things of a kind that can be made again."""
    return Path("~/.cache/qwen2_jax", kind).expanduser()


class RemoteFile:
    """An object at a URL, as it was when its folder was listed: one replaced since is an error where there are
    generations."""

    def __init__(self, fs: Any, protocol: str, info: dict[str, Any]) -> None:
        self._fs, self._info = fs, info
        self.name = info["name"].rsplit("/", 1)[-1]
        self.url = f"{protocol}://{info['name'].lstrip('/')}"
        self.size = int(info["size"])

    @cached_property
    def version(self) -> str:
        """What changes when the object does."""
        for key in ("generation", "etag", "ETag"):
            if value := self._info.get(key):
                return str(value)
        return self._fs.ukey(self._info["name"])

    def read(self, start: int, stop: int) -> UInt8[np.ndarray, " n"]:
        """See `ByteFile`. Repeated while it fails for reasons that may pass."""
        if stop > self.size:
            raise EndOfFileError(self.url, stop)
        return np.frombuffer(with_retries(lambda: self._range(start, stop), self.url), np.uint8)

    def _range(self, start: int, stop: int) -> bytes:
        pinned = {"generation": self._info["generation"]} if "generation" in self._info else {}
        data = self._fs.cat_file(self._info["name"], start, stop, **pinned) if stop > start else b""
        if len(data) != stop - start:
            raise TimeoutError(f"{len(data)} bytes came instead of {stop - start}")
        return data

    def read_bytes(self) -> bytes:
        """The whole object."""
        return self.read(0, self.size).tobytes()

    def copy_to(self, path: Path) -> None:
        """Writes the whole object to a local file and compares it with its stored checksum where there is one."""
        checksum = google_crc32c.Checksum()
        with path.open("wb") as file:
            for start in range(0, self.size, _BLOCK):
                block = self.read(start, min(start + _BLOCK, self.size)).tobytes()
                checksum.update(block)
                file.write(block)
        if "crc32c" in self._info and checksum.hexdigest().decode() != self.crc32c():
            raise ModelError(f"{self.url}: its bytes do not match its checksum; copy it there again")

    def crc32c(self) -> str:
        """See `ByteFile`. From the object's metadata where it is there."""
        if stored := self._info.get("crc32c"):
            return base64.b64decode(stored).hex()
        checksum = google_crc32c.Checksum()
        for start in range(0, self.size, _BLOCK):
            checksum.update(self.read(start, min(start + _BLOCK, self.size)).tobytes())
        return checksum.hexdigest().decode()


class EndOfFileError(ModelError):
    """A file ends before what should be in it."""

    def __init__(self, url: str, stop: int) -> None:
        super().__init__(f"{url}: ends before byte {stop}; download it again")


def is_remote(path: str) -> bool:
    """Whether a model path is a URL."""
    return "://" in path


@cache
def remote_files(url: str) -> dict[str, RemoteFile]:
    """The files of a remote folder by name, or the one file that `url` is. Stays what it first was in this process."""
    protocol = url.partition("://")[0]
    fs, path = with_retries(lambda: _file_system(url), url)
    found = with_retries(lambda: fs.ls(path, detail=True), url)
    files = [RemoteFile(fs, protocol, info) for info in found if info["type"] == "file"]
    if not files:
        raise ModelError(f"{url}: no such folder or file")
    return {file.name: file for file in files}


def files_below(url: str) -> dict[str, ByteFile]:
    """Every file at any depth of a folder, by its path in there, as of now; none where there is no such folder."""
    if not is_remote(url):
        root = Path(url)
        with reading(root):
            return {str(path.relative_to(root)): LocalFile.of(path) for path in root.rglob("*") if path.is_file()}
    protocol = url.partition("://")[0]
    fs, root_path = with_retries(lambda: _file_system(url), url)
    found = with_retries(lambda: fs.find(root_path, detail=True), url)
    return {
        name.removeprefix(root_path).lstrip("/"): RemoteFile(fs, protocol, info | {"name": name})
        for name, info in found.items()
    }


def replace_file(url: str, content: bytes) -> None:
    """Writes or overwrites a small file in one step, so that nobody sees half of it."""
    if is_remote(url):
        fs, path = with_retries(lambda: _file_system(url), url)
        with_retries(lambda: fs.pipe_file(path, content), url)
        return
    draft = Path(f"{url}.{os.getpid()}")
    with reading(url):
        draft.write_bytes(content)
        draft.replace(url)


def matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    """Those of the names that match one of the glob patterns."""
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def with_retries(action: Callable[[], _T], url: str) -> _T:
    """What `action` returns, tried again where a fault of the network may pass. Raises `ModelError` naming `url`."""
    for failures in range(1, _TRIES + 1):
        try:
            return action()
        except ModelError:
            raise
        except FileNotFoundError as error:
            raise ModelError(f"{url}: no such folder or file, or it was replaced while it was read") from error
        except Exception as error:  # the file system's own, the HTTP library's and the credentials' errors
            if failures == _TRIES or not _is_transient(error):
                raise ModelError(f"{url}: cannot be read ({_reason(error)})") from error
        time.sleep(min(16.0, 0.5 * 2**failures) * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


def _is_transient(error: Exception) -> bool:
    """Whether to try again: of the errors with an HTTP status those of the server, and every broken connection."""
    code = str(getattr(error, "code", None) or getattr(error, "status", None) or "")
    if code.isdigit():
        return int(code) in (408, 429) or int(code) >= 500
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):
        return False
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.startswith(("aiohttp", "requests"))


def _reason(error: Exception) -> str:
    if type(error).__module__.startswith("google.auth"):
        return "no valid Google Cloud credentials; run `gcloud auth application-default login`"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url.rstrip("/"), use_listings_cache=False, **_options(protocol))
    except (ImportError, ValueError) as error:
        raise ModelError(f"{url}: {error}; use a local folder, a hub id or a gs:// URL") from error


def _options(protocol: str) -> dict[str, Any]:
    """For a bucket: time-outs, which gcsfs has none of, and an emulator where the environment names one."""
    if protocol not in ("gs", "gcs"):
        return {}
    endpoint = emulator_url()
    if endpoint:
        # gcsfs decides on import whether to speak gRPC, which emulators of the JSON API do not.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import aiohttp

    timeout = aiohttp.ClientTimeout(sock_connect=15, sock_read=60)
    token = "anon" if endpoint else "google_default"
    return {"token": token, "endpoint_url": endpoint, "requests_timeout": timeout, "skip_instance_cache": True}
