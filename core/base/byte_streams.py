"""A seekable stream over range reads, as zipfile, gzip and pickle need it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

_READ_BYTES = 64 << 20


class SeekableBytes(io.RawIOBase):
    """`size` bytes, of which `fetch(start, stop)` returns bytes start..stop-1; its exceptions reach the reader."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        self._fetch, self._size, self._position = fetch, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._take(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._take(_READ_BYTES), b""))

    def _take(self, limit: int) -> bytes:
        stop = min(self._position + limit, self._size)
        if stop <= self._position:
            return b""
        data = self._fetch(self._position, stop)
        self._position = stop
        return data
