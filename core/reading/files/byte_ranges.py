"""Ranges of bytes of a stored file: a local one is mapped to memory, any other is read range by range."""

import io
import mmap
from collections.abc import Callable
from functools import partial
from typing import BinaryIO, Protocol

from core.base.byte_streams import SeekableBytes
from core.object_store import LocalStore, ObjectStore


class ByteRanges(Protocol):
    """A file of `size` bytes."""

    size: int

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes start to stop - 1, without a copy where the file is mapped. Raises EOFError if it ends before."""
        ...


class _Mapped:
    def __init__(self, file: BinaryIO) -> None:
        # An empty file cannot be mapped; a file that is cut off while it is mapped kills the process that touches it.
        self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.size = len(self._bytes)

    def read(self, start: int, stop: int) -> memoryview:
        """See `ByteRanges`."""
        if stop > self.size:
            raise EOFError(f"it has {self.size} bytes, not {stop}")
        return self._bytes[start:stop]


class _Ranged:
    """Each thread that reads at the same time has a stream of its own, for a stream has one position."""

    def __init__(self, open_file: Callable[[], BinaryIO]) -> None:
        self._open = open_file
        self._idle = [open_file()]
        self.size = self._idle[0].seek(0, io.SEEK_END)

    def read(self, start: int, stop: int) -> memoryview:
        """See `ByteRanges`."""
        try:
            file = self._idle.pop()
        except IndexError:
            file = self._open()
        file.seek(start)
        pieces, left = [], stop - start
        while left and (piece := file.read(left)):
            pieces.append(piece)
            left -= len(piece)
        self._idle.append(file)
        if left:
            raise EOFError(f"it has {stop - left} bytes, not {stop}")
        return memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces))


def open_ranges(store: ObjectStore, name: str, size: int) -> ByteRanges:
    """The file `name`, which must have `size` bytes. Raises OSError if it is gone, ValueError for another size."""
    if isinstance(store, LocalStore):
        with store.open(name) as file:
            ranges: ByteRanges = _Mapped(file)
    else:
        ranges = _Ranged(partial(store.open, name))
    if ranges.size != size:
        raise ValueError(f"it has {ranges.size} bytes where {size} were written")
    return ranges


def as_stream(ranges: ByteRanges) -> SeekableBytes:
    """The whole file as a seekable stream."""
    return SeekableBytes(lambda start, stop: bytes(ranges.read(start, stop)), ranges.size)
