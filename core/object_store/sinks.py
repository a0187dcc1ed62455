"""The streams that shard files are written to: one digests what passes, one has its own thread, one compresses."""

import hashlib
import os
import struct
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import google_crc32c
from isal import isal_zlib

# Small enough that what is on its way stays in the caches of a few cores, large enough that its end costs nothing.
BLOCK_BYTES = 1 << 20
# Blocks that are compressed, or wait for their turn: enough for every core of a small host.
_IN_FLIGHT = min(32, 2 * (os.cpu_count() or 1) + 2)
# Level 1 of ISA-L: 20-30× zlib's level 9 on activations at the same ratio or better; level 0 expands them.
LEVEL = 1
_CHUNK_BYTES = 4 << 20
# Large enough that a disk is kept busy by one, small enough that the last one is short.
_SYNC_BYTES = 16 << 20
# Small enough that the memory of a copy is used again: fresh pages cost several times what the copy does.
_COPIED_BYTES = 256 << 10
# The largest of ISA-L's working memories, 5% faster than its default.
_MEMORY_LEVEL = 9
# Deflate, no name, no time stamp, system unknown.
_GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
# An empty block that says it is the last one.
_LAST_BLOCK = b"\x03\x00"


class Sink(Protocol):
    """A stream that can only be appended to."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Appends `data`."""
        ...


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes, crc32c as 8 hex digits (what GCS keeps for every object) and sha256."""

    bytes: int
    crc32c: str
    sha256: str


class DigestWriter:
    """A writable stream that passes everything on to `sink` and keeps its digest."""

    def __init__(self, sink: Sink | None = None) -> None:
        self._sink = sink
        self._sha256 = hashlib.sha256()
        self._crc32c = 0
        self._bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Writes and counts `data`."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            chunk = view[start : start + _CHUNK_BYTES]
            if self._sink is not None:
                self._sink.write(chunk)
            self._sha256.update(chunk)
            for piece in range(0, len(chunk), _COPIED_BYTES):
                # google_crc32c takes bytes objects alone.
                self._crc32c = google_crc32c.extend(self._crc32c, bytes(chunk[piece : piece + _COPIED_BYTES]))
        self._bytes += len(view)
        return len(view)

    def digest(self) -> FileDigest:
        """The digest of what was written so far."""
        return FileDigest(self._bytes, f"{self._crc32c:08x}", self._sha256.hexdigest())


class WriteBehind:
    """Passes everything on to `sink` in a thread of its own, in order, while the caller produces more.

    A context manager: at its end everything is written. At most `in_flight` writes wait, so memory stays bounded. An
    error of the sink is raised by a later `write`, or at the end.
    """

    def __init__(self, sink: Sink, in_flight: int = 4) -> None:
        self._sink = sink
        self._in_flight = in_flight
        self._pending: deque[Future[int]] = deque()
        self._thread = ThreadPoolExecutor(1, "write-behind")

    def __enter__(self) -> "WriteBehind":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._thread.shutdown(cancel_futures=kind is not None)
        while kind is None and self._pending:
            self._pending.popleft().result()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Takes `data`, which has to stay as it is until it is written; blocks while too many writes wait."""
        self._pending.append(self._thread.submit(self._sink.write, data))
        if len(self._pending) > self._in_flight:
            self._pending.popleft().result()
        return len(data)


class EagerFile:
    """A file that goes to the disk while more is written and digested: little is left for the sync at its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._unsynced = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Writes `data`; waits for the disk now and then."""
        self._unsynced += self._file.write(data)
        if self._unsynced >= _SYNC_BYTES:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._unsynced = 0
        return len(data)


def digest_stream(stream: BinaryIO) -> FileDigest:
    """The digest of the rest of `stream`."""
    writer = DigestWriter()
    while chunk := stream.read(_CHUNK_BYTES):
        writer.write(chunk)
    return writer.digest()


def deflate_block(pieces: Sequence[memoryview]) -> bytes:
    """A part of a raw deflate stream that ends on a byte boundary and refers to nothing before it.

    The bytes may depend on how the block is cut into pieces, because ISA-L compresses each piece as it comes. The same
    pieces give the same bytes; any pieces of the same block inflate to the same block.
    """
    compressor = isal_zlib.compressobj(LEVEL, wbits=-isal_zlib.MAX_WBITS, memLevel=_MEMORY_LEVEL)
    return b"".join([*map(compressor.compress, pieces), compressor.flush(isal_zlib.Z_FULL_FLUSH)])


class ParallelGzipWriter:
    """Compresses into `sink` with the threads of `executor`: blocks are deflated on their own and strung together.

    The result is one gzip member (RFC 1952). A member for each block would be simpler and as valid, but Python's
    `gzip.decompress` copies the rest of the file at every member. Blocks are cut by size alone and there is no time
    stamp, so the bytes do not depend on the number of threads.

    At most `in_flight` blocks wait for compression or for their turn, so memory stays bounded. `close` writes what is
    left and leaves `sink` open.
    """

    def __init__(self, sink: Sink, executor: Executor, in_flight: int = _IN_FLIGHT) -> None:
        self._sink = sink
        self._executor = executor
        self._in_flight = in_flight
        self._pending: deque[Future[bytes]] = deque()
        # Pieces of what was written, not a copy: filling fresh memory would cost as much as compressing does.
        self._block: list[memoryview] = []
        self._block_bytes = 0
        self._crc32 = 0
        self._size = 0
        sink.write(_GZIP_HEADER)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Takes `data`, which has to stay as it is until `close`; blocks while too many blocks are in flight."""
        view = memoryview(data).cast("B")
        start = 0
        while start < len(view):
            piece = view[start : start + BLOCK_BYTES - self._block_bytes]
            self._block.append(piece)
            self._block_bytes += len(piece)
            self._crc32 = isal_zlib.crc32(piece, self._crc32)
            start += len(piece)
            if self._block_bytes == BLOCK_BYTES:
                self._submit()
        return len(view)

    def close(self) -> None:
        """Writes every block that is left, and the end of the member."""
        self._submit()
        while self._pending:
            self._sink.write(self._pending.popleft().result())
        self._sink.write(_LAST_BLOCK + struct.pack("<II", self._crc32, self._size % 2**32))

    def _submit(self) -> None:
        self._pending.append(self._executor.submit(deflate_block, self._block))
        self._size += self._block_bytes
        self._block, self._block_bytes = [], 0
        if len(self._pending) > self._in_flight:
            self._sink.write(self._pending.popleft().result())
