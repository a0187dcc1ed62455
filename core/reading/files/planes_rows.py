"""Rows of a planes shard: the table of contents, then only the blocks in which the rows lie."""

import io
import math
import struct
import zipfile
from typing import BinaryIO, cast

import numpy as np
import zstandard
from isal import isal_zlib
from jaxtyping import Int32, Shaped

from core.base.dtypes import ARRAY_DTYPES
from core.reading.files.base import ExpectedRows
from core.reading.files.byte_ranges import ByteRanges, as_stream
from core.reduce.reductions import VALUES
from core.shards.formats.planes_shard import Header, decode_block

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_INDEX = {"sample_idx": np.int64, "sample_offsets": np.int64, "token_ids": np.int32, "positions": np.int32}
_TAIL_BYTES = 1 << 20
_NPY_HEAD_BYTES = 4096


class PlanesRows:
    """See `RowFile`. Holds the last block that was decoded, and of a file in a bucket also what is not in blocks."""

    def __init__(self, ranges: ByteRanges, expected: ExpectedRows) -> None:
        self._ranges, self._expected = ranges, expected
        self._arrays: dict[str, np.ndarray] = {}
        self._block: tuple[str, np.ndarray] | None = None
        try:
            stream = io.BufferedReader(as_stream(ranges), _TAIL_BYTES)
            with zipfile.ZipFile(cast(BinaryIO, stream)) as archive:
                self._members = {member.filename: member for member in archive.infolist()}
            self._header = Header.from_json(bytes(self._member("shard.json")))
            self.sample_idx, self.offsets = self._index("sample_idx"), self._index("sample_offsets")
        except (zipfile.BadZipFile, struct.error, TypeError, RuntimeError) as error:
            raise ValueError(f"not a readable planes shard: {error}") from error
        expected.check_index(self.sample_idx, self.offsets)
        self._check_header(expected)

    def rows(self, layer: int, array: str, start: int, stop: int) -> Shaped[np.ndarray, "k W"]:
        """See `RowFile`."""
        if array != VALUES:
            return self._array(f"layer_{layer}/{array}")[start:stop]
        size = self._header.block_tokens
        blocks = [self._decoded(layer, block) for block in range(start // size, -(-stop // size))]
        if len(blocks) == 1:
            return blocks[0][start % size : stop - start + start % size]
        if not blocks:
            return np.empty((0, self._header.width), ARRAY_DTYPES[self._header.dtype])
        return np.concatenate([blocks[0][start % size :], *blocks[1:]])[: stop - start]

    def token_ids(self, start: int, stop: int) -> Int32[np.ndarray, "k"] | None:
        """See `RowFile`."""
        return self._index("token_ids")[start:stop] if "token_ids.npy" in self._members else None

    def positions(self, start: int, stop: int) -> Int32[np.ndarray, "k"] | None:
        """See `RowFile`."""
        return self._index("positions")[start:stop] if "positions.npy" in self._members else None

    def _check_header(self, expected: ExpectedRows) -> None:
        header, n_rows = self._header, int(self.offsets[-1])
        if set(header.layers) != set(expected.layers) or {VALUES, *header.more} != expected.arrays.keys():
            raise ValueError("its layers and arrays are not those of its record")
        expected.check_array(VALUES, (header.tokens, header.width), ARRAY_DTYPES[header.dtype], n_rows)

    def _decoded(self, layer: int, block: int) -> Shaped[np.ndarray, "k W"]:
        name, header = f"layer_{layer}/{block:06d}.zst", self._header
        found = self._block
        if found is None or found[0] != name:
            tokens = min(header.block_tokens, header.tokens - block * header.block_tokens)
            try:
                values = decode_block(self._member(name), tokens, header.width, ARRAY_DTYPES[header.dtype])
            except zstandard.ZstdError as error:
                raise ValueError(f"{name}: {error}") from error
            self._block = found = name, values
        return found[1]

    def _index(self, name: str) -> np.ndarray:
        array = self._array(name)
        if array.dtype != _INDEX[name] or array.ndim != 1:
            raise ValueError(f"{name}.npy is {array.dtype} of shape {array.shape}")
        return array

    def _array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            self._arrays[name] = array = _array_in(self._member(f"{name}.npy"))
            _, _, kind = name.rpartition("/")
            if "/" in name:
                self._expected.check_array(kind, array.shape, array.dtype, self._header.tokens)
            elif name in ("token_ids", "positions") and len(array) != self._header.tokens:
                raise ValueError(f"{name}.npy has {len(array)} entries for {self._header.tokens} rows")
        return self._arrays[name]

    def _member(self, name: str) -> memoryview:
        """A member's bytes, which must have its CRC. A compressed member is refused: it can expand to any size."""
        member = self._members.get(name)
        if member is None or member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is {'missing' if member is None else 'compressed'}")
        # Header and data in one request: our writer puts nothing but the name between them.
        data = member.header_offset + _LOCAL_HEADER.size + len(name.encode())
        whole = self._ranges.read(member.header_offset, data + member.file_size)
        head = _LOCAL_HEADER.unpack(whole[: _LOCAL_HEADER.size])
        if head[0] != b"PK\3\4" or head[-2:] != (len(name.encode()), 0):
            raise ValueError(f"{name} is not where the table of contents says")
        found = whole[data - member.header_offset :]
        if isal_zlib.crc32(found) != member.CRC:
            raise ValueError(f"{name} was damaged or changed: its CRC-32 is not that of its content")
        return found


def _array_in(data: memoryview) -> np.ndarray:
    """The array of a .npy file, as a view of its bytes: those of a mapped file take no memory of ours."""
    head = io.BytesIO(data[:_NPY_HEAD_BYTES])
    if np.lib.format.read_magic(head) != (1, 0):
        raise ValueError("an array has a header of another version than runs write")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(head)
    if is_fortran or dtype.hasobject:
        raise ValueError(f"an array is {dtype}, or its columns stand together")
    return np.frombuffer(data, dtype, math.prod(shape), head.tell()).reshape(shape)
