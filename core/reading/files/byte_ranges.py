"""Ranges of bytes of a stored file: a local one is mapped to memory, any other is read range by range."""

import mmap
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
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size = file, size

    def read(self, start: int, stop: int) -> memoryview:
        """See `ByteRanges`."""
        self._file.seek(start)
        pieces, left = [], stop - start
        while left and (piece := self._file.read(left)):
            pieces.append(piece)
            left -= len(piece)
        if left:
            raise EOFError(f"it has {stop - left} bytes, not {stop}")
        return memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces))


def open_ranges(store: ObjectStore, name: str, size: int) -> ByteRanges:
    """The file `name`, which must have `size` bytes. Raises OSError if it is gone, ValueError for another size."""
    file = store.open(name)
    if isinstance(store, LocalStore):
        with file:
            ranges: ByteRanges = _Mapped(file)
    else:
        ranges = _Ranged(file, file.seek(0, 2))
    if ranges.size != size:
        raise ValueError(f"it has {ranges.size} bytes where {size} were written")
    return ranges


def as_stream(ranges: ByteRanges) -> SeekableBytes:
    """The whole file as a seekable stream."""
    return SeekableBytes(lambda start, stop: bytes(ranges.read(start, stop)), ranges.size)
