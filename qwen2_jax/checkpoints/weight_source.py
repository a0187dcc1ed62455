"""Where weights come from: checkpoints of named tensors, of which any rows can be read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np

from core.base.errors import ModelError
from qwen2_jax.checkpoints.files import ByteFile

FLOAT_TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class WeightSource(Protocol):
    """A checkpoint: named tensors."""

    url: str

    def names(self) -> Collection[str]:
        """Every tensor in the checkpoint."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1 of a tensor of one dimension or more, in a float type that holds what is stored exactly.

        Raises `ModelError` when the tensor holds no floats.
        """
        ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies row after row in a file. kind: its type, by safetensors' name."""

    file: ByteFile
    offset: int
    kind: str
    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1, as stored."""
        dtype = FLOAT_TYPES[self.kind]
        row = int(np.prod(self.shape[1:], dtype=np.int64)) * dtype.itemsize
        data = self.file.read(self.offset + start * row, self.offset + stop * row)
        return data.view(dtype).reshape(stop - start, *self.shape[1:])


class Checkpoint:
    """Tensors of one or more files."""

    def __init__(self, url: str, tensors: Mapping[str, StoredTensor]) -> None:
        self.url = url
        self._tensors = tensors

    def names(self) -> Collection[str]:
        """See `WeightSource`."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `WeightSource`."""
        return self._tensors[name].shape

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """See `WeightSource`."""
        tensor = self._tensors[name]
        if tensor.kind not in FLOAT_TYPES:
            raise ModelError(
                f"{tensor.file.url}: {name} is stored as {tensor.kind}; supported are {', '.join(FLOAT_TYPES)}"
            )
        return tensor.read(start, stop)
