"""Data pages of hidden states: lists of L layers of lists of T tokens of lists of D values.

pyarrow computes a repetition level for each value, at a tenth of the speed of a disk. Here each vector has the same two
runs of levels, whatever its values are, and the values are written as they lie in memory.
https://parquet.apache.org/docs/file-format/data-pages/encodings/
"""

import struct
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Shaped

from core.base.errors import RunError
from parquet_cache.parquet import thrift_compact as thrift
from parquet_cache.parquet.thrift_compact import Field

# A level of the schema that is optional adds one, a repeated one too: an optional list of optional lists of optional
# lists of optional values has 7 definition levels and 3 repetition levels.
_DEFINED = 7
_NEW_ROW, _NEW_LAYER, _NEW_TOKEN, _SAME_TOKEN = range(4)
_DATA_PAGE, PLAIN, RLE = 0, 0, 3
_LARGEST_PAGE = (1 << 31) - 1
_WANTED_PAGE = 64 << 20

State = Shaped[np.ndarray, "_ D"]


def state_pages(layers: Sequence[State]) -> Iterator[list[bytes | memoryview]]:
    """The pages of one row, each as pieces to be written one after the other.

    layers: (T, D) C-contiguous arrays of one shape, in little-endian float16 or float32, one for each layer. Raises
    RunError for a layer of 2 GiB, which no page can hold.
    """
    in_page = max(1, _WANTED_PAGE // max(1, layers[0].nbytes))
    for start in range(0, len(layers), in_page):
        yield _page(layers[start : start + in_page], starts_row=start == 0)


def n_values(layers: Sequence[State]) -> int:
    """The values of a row."""
    return sum(layer.size for layer in layers)


def _page(layers: Sequence[State], *, starts_row: bool) -> list[bytes | memoryview]:
    n_tokens, width = layers[0].shape
    count = len(layers) * n_tokens * width
    levels = _sized(_repetition(len(layers), n_tokens, width, starts_row)) + _sized(_run(count, _DEFINED))
    size = len(levels) + sum(layer.nbytes for layer in layers)
    if size > _LARGEST_PAGE:
        raise RunError(f"{n_tokens} tokens of {width} values are too many for a page of Parquet: lower --n_pos")
    return [_header(count, size), levels, *(layer.reshape(-1).view(np.uint8).data for layer in layers)]


def _repetition(n_layers: int, n_tokens: int, width: int, starts_row: bool) -> bytes:
    """A run of one value for the first value of each token, then a run of the others."""
    first = np.full((n_layers, n_tokens), _NEW_TOKEN, np.uint8)
    first[:, 0] = _NEW_LAYER
    first[0, 0] = _NEW_ROW if starts_row else _NEW_LAYER
    others = _run(width - 1, _SAME_TOKEN) if width > 1 else b""
    runs = np.empty((first.size, 2 + len(others)), np.uint8)
    runs[:, 0] = 1 << 1
    runs[:, 1] = first.reshape(-1)
    runs[:, 2:] = np.frombuffer(others, np.uint8)
    return runs.tobytes()


def _run(count: int, level: int) -> bytes:
    """A run of RLE: twice its length as a varint, then the level."""
    out = bytearray()
    head = count << 1
    while head > 0x7F:
        out.append(head & 0x7F | 0x80)
        head >>= 7
    return bytes([*out, head, level])


def _sized(levels: bytes) -> bytes:
    return struct.pack("<I", len(levels)) + levels


def _header(count: int, size: int) -> bytes:
    data_page = {
        1: Field(thrift.I32, count),
        2: Field(thrift.I32, PLAIN),
        3: Field(thrift.I32, RLE),
        4: Field(thrift.I32, RLE),
    }
    header = {
        1: Field(thrift.I32, _DATA_PAGE),
        2: Field(thrift.I32, size),
        3: Field(thrift.I32, size),
        5: Field(thrift.STRUCT, data_page),
    }
    return thrift.encode_struct(header)
