"""safetensors files: writing their header, and reading tensors from their bytes.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, header, tensors back to back).
"""

import json

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


def read_tensors(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, by name. Raises ValueError or KeyError if `data` is not one."""
    header_end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:header_end])
    dtypes = {name: dtype for dtype, name in _NAMES.items()}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            raw = np.frombuffer(data, np.uint8, stop - start, header_end + start)
            tensors[name] = raw.view(dtypes[entry["dtype"]]).reshape(entry["shape"])
    return tensors
