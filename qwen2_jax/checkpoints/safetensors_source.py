"""The header of a safetensors file (https://github.com/huggingface/safetensors): where its tensors are.

The package's own reader maps files into memory and knows local ones alone.
"""

from __future__ import annotations

import json
import math
from typing import Any

from core.base.errors import ModelError
from qwen2_jax.checkpoints.files import ByteFile, EndOfFileError
from qwen2_jax.checkpoints.weight_source import StoredTensor

_LENGTH = 8
_MAX_HEADER = 100_000_000  # of the format
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}


def safetensors_index(file: ByteFile) -> dict[str, StoredTensor]:
    """Name -> place of every tensor. Raises `ModelError` unless the tensors fill the file without gap or overlap."""
    try:
        header, data_start = _read_header(file)
        tensors = {name: _tensor(file, data_start, entry) for name, entry in header.items() if name != "__metadata__"}
        _check_layout(file, data_start, [_span(entry) for name, entry in header.items() if name != "__metadata__"])
    except (ValueError, KeyError, TypeError, AttributeError, EndOfFileError) as error:
        reason = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise ModelError(f"{file.url}: not a whole safetensors file ({reason}); download it again") from error
    return tensors


def _read_header(file: ByteFile) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(0, _LENGTH).tobytes(), "little")
    if not 2 <= length <= min(_MAX_HEADER, file.size - _LENGTH):
        raise ValueError(f"its header is said to be {length} bytes long")
    return json.loads(file.read(_LENGTH, _LENGTH + length).tobytes()), _LENGTH + length


def _span(entry: dict[str, Any]) -> tuple[int, int]:
    start, stop = entry["data_offsets"]
    return int(start), int(stop)


def _tensor(file: ByteFile, data_start: int, entry: dict[str, Any]) -> StoredTensor:
    kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), _span(entry)
    proper = all(type(size) is int and size >= 0 for size in shape)
    if not proper or math.prod(shape) * _BITS[kind] != 8 * (stop - start):
        raise ValueError(f"{kind} of shape {shape} in {stop - start} bytes")
    return StoredTensor(file, data_start + start, kind, shape)


def _check_layout(file: ByteFile, data_start: int, spans: list[tuple[int, int]]) -> None:
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"a tensor begins at byte {start} where the one before ends at {end}")
        end = stop
    if data_start + end != file.size:
        raise ValueError(f"{file.size} bytes long where its header needs {data_start + end}")
