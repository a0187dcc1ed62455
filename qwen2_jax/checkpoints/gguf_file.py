"""The container of GGUF files: metadata, and tensors of which any rows can be dequantised.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the package `gguf` maps local files
into memory and makes an array of every string in them; only its dequantisation is used.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from core.base.errors import ModelError
from qwen2_jax.checkpoints.files import ByteFile, EndOfFileError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # unless the metadata say otherwise
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # by the number of their kind
_UNQUANTISED = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
    GGMLQuantizationType.F64: np.dtype(np.float64),
}


@dataclass(frozen=True)
class GgufTensor:
    """shape: as numpy counts it, rows first. offset: in the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; quantised blocks lie within rows. A vector has rows of one element."""
        per_block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape[1:]) * block_bytes // per_block

    @property
    def is_whole(self) -> bool:
        """Whether rows are whole blocks."""
        return (self.shape[1:] or (1,))[-1] % GGML_QUANT_SIZES[self.kind][0] == 0


@dataclass(frozen=True)
class _Array:
    """An array of the metadata that stays in the file until it is asked for: vocabularies are large."""

    kind: int
    count: int
    start: int
    stop: int


class GgufContainer:
    """A GGUF file. Raises `ModelError` when it is damaged."""

    def __init__(self, file: ByteFile) -> None:
        self.file = file
        try:
            header = _Header(file)
            self._metadata = {header.string(): header.value(header.number("I")) for _ in range(header.n_metadata)}
            self._tensors = self._read_tensors(header)
        except (ValueError, KeyError, EndOfFileError) as error:
            reason = "it ends too early" if isinstance(error, EndOfFileError) else error
            raise ModelError(f"{file.url}: not a whole GGUF file ({reason}); download it again") from error

    def _read_tensors(self, header: _Header) -> dict[str, GgufTensor]:
        described = {}
        for _ in range(header.n_tensors):
            name, n_dimensions = header.string(), header.number("I")
            if n_dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"{name} has {n_dimensions} dimensions")
            shape = tuple(header.number("Q") for _ in range(n_dimensions))[::-1]
            described[name] = GgufTensor(GGMLQuantizationType(header.number("I")), shape, header.number("Q"))
        alignment = self.metadata("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-header.position // alignment) * alignment
        tensors = {name: GgufTensor(t.kind, t.shape, start + t.offset) for name, t in described.items()}
        for name, tensor in tensors.items():
            if not tensor.is_whole or tensor.offset + tensor.shape[0] * tensor.row_bytes > self.file.size:
                raise ValueError(f"{name} does not lie whole in it")
        return tensors

    def metadata(self, key: str, default: Any = None) -> Any:
        """A metadata value as Python data, or the default where the file does not state it."""
        value = self._metadata.get(key, default)
        if not isinstance(value, _Array):
            return value
        header = _Header(self.file, value.start, value.stop)
        return [header.value(value.kind) for _ in range(value.count)]

    def keys(self) -> Collection[str]:
        """Every metadata key."""
        return self._metadata.keys()

    def tensors(self) -> dict[str, GgufTensor]:
        """Every tensor by name."""
        return self._tensors

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1, as stored where that is a float type, else dequantised to float32."""
        tensor = self._tensors[name]
        size = tensor.row_bytes
        data = self.file.read(tensor.offset + start * size, tensor.offset + stop * size)
        shape = (stop - start, *tensor.shape[1:])
        if tensor.kind in _UNQUANTISED:
            return data.view(_UNQUANTISED[tensor.kind]).reshape(shape)
        try:
            return dequantize(data.reshape(stop - start, size), tensor.kind).reshape(shape)
        except NotImplementedError as error:
            raise ModelError(
                f"{self.file.url}: {name} is quantised as {tensor.kind.name}, which cannot be read; use Q8_0 or F16"
            ) from error


class _Header:
    """Reads the beginning of a file value by value, fetching more of it as it is needed."""

    def __init__(self, file: ByteFile, start: int = 0, stop: int | None = None) -> None:
        self._file, self._base, self._at = file, start, 0
        self._data = bytearray() if stop is None else bytearray(file.read(start, stop))
        if stop is None:
            self._read_counts()

    def _read_counts(self) -> None:
        if self._take(4) != _MAGIC:
            raise ValueError("it does not begin as one")
        version = self.number("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, big-endian or unknown")
        self.n_tensors, self.n_metadata = self.number("Q"), self.number("Q")

    @property
    def position(self) -> int:
        """In the file."""
        return self._base + self._at

    def _take(self, count: int) -> bytearray:
        self._fetch(count)
        self._at += count
        return self._data[self._at - count : self._at]

    def _fetch(self, count: int) -> None:
        end = self._at + count
        if end > len(self._data):
            begin = self._base + len(self._data)
            ahead = min(begin + max(len(self._data), 1 << 20), self._file.size)
            self._data += self._file.read(begin, max(self._base + end, ahead)).tobytes()

    def number(self, code: str) -> Any:
        """A value that `struct` knows by this letter."""
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        """Text. ValueError where it is not UTF-8."""
        return str(self._take(self.number("Q")), "utf-8")

    def value(self, kind: int) -> Any:
        """A metadata value; an array only as its place."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        kind, count = self.number("I"), self.number("Q")
        start = self.position
        if kind in _SCALARS:
            self._take(count * struct.calcsize("<" + _SCALARS[kind]))
        elif kind == _STRING:
            self._skip_strings(count)
        else:
            raise ValueError(f"an array of values of kind {kind}")
        return _Array(kind, count, start, self.position)

    def _skip_strings(self, count: int) -> None:
        for _ in range(count):
            self._take(self.number("Q"))
