"""Rows of an npz shard: the table of contents, then only the bytes of the rows that are asked for."""

import io
import struct
import zipfile
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np
from jaxtyping import Int32, Shaped

from core.reading.files.base import ExpectedRows
from core.reading.files.byte_ranges import ByteRanges, as_stream
from core.reduce.reductions import array_name
from core.shards.formats.npz_shard import INDEX_DTYPES
from core.shards.formats.stored_zip import MAX_NPY_HEADER, npy_header

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_TAIL_BYTES = 1 << 20


@dataclass(frozen=True)
class _Array:
    """An array in the file: its dtype, shape, and where its values begin."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


class NpzRows:
    """See `RowFile`."""

    def __init__(self, ranges: ByteRanges, expected: ExpectedRows) -> None:
        self._ranges = ranges
        try:
            stream = io.BufferedReader(as_stream(ranges), _TAIL_BYTES)
            with zipfile.ZipFile(cast(BinaryIO, stream)) as archive:
                self._arrays = {
                    member.filename.removesuffix(".npy"): self._locate(member) for member in archive.infolist()
                }
            self.sample_idx, self.offsets = (self._index(name) for name in ("sample_idx", "sample_offsets"))
        except (zipfile.BadZipFile, struct.error, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"not a readable npz shard: {error!r}") from error
        expected.check_index(self.sample_idx, self.offsets)
        n_rows = int(self.offsets[-1])
        for layer in expected.layers:
            for name in expected.arrays:
                array = self._arrays[array_name(f"layer_{layer}", name)]
                expected.check_array(name, array.shape, array.dtype, n_rows)
        for name in ("token_ids", "positions"):
            if name in self._arrays and self._arrays[name].shape != (n_rows,):
                raise ValueError(f"{name} has shape {self._arrays[name].shape} for {n_rows} rows")

    def rows(self, layer: int, array: str, start: int, stop: int) -> Shaped[np.ndarray, "k W"]:
        """See `RowFile`."""
        return self._slice(array_name(f"layer_{layer}", array), start, stop)

    def token_ids(self, start: int, stop: int) -> Int32[np.ndarray, "k"] | None:
        """See `RowFile`."""
        return self._slice("token_ids", start, stop) if "token_ids" in self._arrays else None

    def positions(self, start: int, stop: int) -> Int32[np.ndarray, "k"] | None:
        """See `RowFile`."""
        return self._slice("positions", start, stop) if "positions" in self._arrays else None

    def _locate(self, member: zipfile.ZipInfo) -> _Array:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename} is compressed")
        end = member.header_offset + _LOCAL_HEADER.size
        head = _LOCAL_HEADER.unpack(self._ranges.read(member.header_offset, end))
        start = end + head[-2] + head[-1]
        if head[0] != b"PK\3\4" or start + member.file_size > self._ranges.size:
            raise ValueError(f"{member.filename} is not where the table of contents says")
        first = self._ranges.read(start, start + min(member.file_size, MAX_NPY_HEADER))
        dtype, shape, place = npy_header(bytes(first), member.file_size)
        return _Array(dtype, shape, start + place)

    def _index(self, name: str) -> np.ndarray:
        array = self._arrays[name]
        if array.dtype != INDEX_DTYPES[name] or len(array.shape) != 1:
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
        return np.array(self._slice(name, 0, array.shape[0]))

    def _slice(self, name: str, start: int, stop: int) -> np.ndarray:
        array = self._arrays[name]
        row_bytes = array.dtype.itemsize * (array.shape[1] if len(array.shape) == 2 else 1)
        data = self._ranges.read(array.start + start * row_bytes, array.start + stop * row_bytes)
        return np.frombuffer(data, array.dtype).reshape(stop - start, *array.shape[1:])
