"""safetensors files: writing their header, and reading tensors from their bytes.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, header, tensors back to back).
"""

import json
import math
from dataclasses import dataclass

import numpy as np

from core.base.dtypes import CODE_DTYPES, DTYPES

_NAMES = {
    DTYPES["float16"]: "F16",
    DTYPES["bfloat16"]: "BF16",
    DTYPES["float32"]: "F32",
    CODE_DTYPES["float8_e4m3fn"]: "F8_E4M3",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint16): "U16",
    np.dtype(np.float64): "F64",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
}
# Tensors after the header start on this boundary.
_ALIGNMENT = 8


def safetensors_header(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """The bytes before `tensors`, which follow in this order. Wide dtypes first keep all of them aligned."""
    entries: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for name, tensor in tensors.items():
        span = [position, position + tensor.nbytes]
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        position = span[1]
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file. Raises ValueError if `data` is not one."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError("its header is not that of a safetensors file")
    return metadata


@dataclass(frozen=True)
class TensorSpan:
    """A tensor's dtype and shape, and its bytes in the file: `start` to `stop`."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def header_end(first_bytes: bytes) -> int:
    """Where the tensors of a safetensors file begin, by its first eight bytes."""
    return 8 + int.from_bytes(first_bytes[:8], "little")


def tensor_spans(head: bytes, n_bytes: int) -> dict[str, TensorSpan]:
    """The tensors of a safetensors file of `n_bytes`, by name; `head` is everything before `header_end`.

    Raises ValueError, KeyError or TypeError if it is not one, or if a tensor is not where its shape says.
    """
    header = json.loads(head[8:])
    dtypes = {name: dtype for dtype, name in _NAMES.items()}
    spans = {}
    for name, entry in header.items():
        if name != "__metadata__":
            (start, stop), dtype, shape = entry["data_offsets"], dtypes[entry["dtype"]], tuple(entry["shape"])
            is_whole = 0 <= start <= stop <= n_bytes - len(head) and all(size >= 0 for size in shape)
            if not is_whole or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has bytes {start} to {stop} for shape {shape}")
            spans[name] = TensorSpan(dtype, shape, len(head) + start, len(head) + stop)
    return spans


def read_tensors(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, by name. Raises ValueError, KeyError or TypeError if `data` is not one."""
    spans = tensor_spans(data[: header_end(data)], len(data))
    return {
        name: np.frombuffer(data, np.uint8, span.stop - span.start, span.start).view(span.dtype).reshape(span.shape)
        for name, span in spans.items()
    }
