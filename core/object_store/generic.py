"""Objects of any other file system that fsspec supports."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, cast

from core.base.errors import RunError, UsageError
from core.object_store.base import Created, Entry, Listing, ObjectInfo, bytes_info, check_name, stream_info

_MEMORY_LOCK = threading.Lock()


class FsspecStore:
    """Any other fsspec URL, for reading. Only `memory://` can be written.

    memory:// lives in this process alone, so a lock makes creation exclusive. Elsewhere fsspec guarantees nothing: its
    "create" may be a check followed by a write, and two writers could both conclude that they created the object.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as exc:
            raise UsageError(f"{url}: {exc}; use a local path, or a gs:// URL") from exc
        self._root = root.rstrip("/")
        self._in_memory = url.startswith("memory://")
        self.url = url.rstrip("/")

    def create_bytes(self, name: str, data: bytes) -> Created:
        """See `ObjectStore`. RunError where creation cannot be made exclusive."""
        path = self._writable(name)
        with _MEMORY_LOCK:
            if not self._fs.exists(path):
                self._fs.pipe_file(path, data)
                return Created.CREATED
        return Created.ALREADY_SAME if self.read_bytes(name) == data else Created.ALREADY_DIFFERENT

    def create_file(self, name: str, local_path: Path, info: ObjectInfo) -> Created:
        """See `ObjectStore`. RunError where creation cannot be made exclusive."""
        data = local_path.read_bytes()
        if bytes_info(data) != info:
            raise RunError(f"{local_path} was changed after it was written: remove it and run again")
        return self.create_bytes(name, data)

    def replace_bytes(self, name: str, data: bytes) -> None:
        """See `ObjectStore`. RunError where nothing can be created."""
        path = self._writable(name)
        with _MEMORY_LOCK:
            self._fs.pipe_file(path, data)

    def read_bytes(self, name: str) -> bytes:
        """See `ObjectStore`."""
        return self._fs.cat_file(self._path(name))

    def open(self, name: str) -> BinaryIO:
        """See `ObjectStore`."""
        if self._in_memory:
            # fsspec returns the same object, with one position, to every reader of a memory file.
            return io.BytesIO(self.read_bytes(name))
        return cast(BinaryIO, self._fs.open(self._path(name), "rb"))

    def info(self, name: str) -> ObjectInfo | None:
        """See `ObjectStore`. Computed by reading."""
        try:
            with self.open(name) as file:
                return stream_info(file)
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> list[str]:
        """See `ObjectStore`."""
        return [entry.name for entry in self.listing(prefix).entries]

    def listing(self, prefix: str = "") -> Listing:
        """See `ObjectStore`. An object without a stored time counts as new."""
        self._fs.invalidate_cache()
        root, now = self._root + "/", time.time()
        found = self._fs.find(self._root, detail=True).items()
        by_name = {path.removeprefix(root): info for path, info in found if path.startswith(root)}
        entries = []
        for name in sorted(name for name in by_name if name.startswith(prefix)):
            info = by_name[name]
            changed = info.get("mtime", info.get("created"))
            modified = changed.timestamp() if isinstance(changed, datetime) else float(changed or now)
            entries.append(Entry(name, int(info.get("size") or 0), modified, str(modified)))
        return Listing(tuple(entries), now)

    def delete(self, name: str) -> None:
        """See `ObjectStore`."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._writable(name))

    def free_bytes(self) -> int | None:
        """See `ObjectStore`: unknown."""
        return None

    def _path(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}"

    def _writable(self, name: str) -> str:
        if not self._in_memory:
            advice = "write to a local path or a gs:// URL"
            raise RunError(f"{self.url}: objects cannot be created exclusively there; {advice}")
        return self._path(name)
