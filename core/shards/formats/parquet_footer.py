"""The footer of a Parquet file, checked before pyarrow sees it: that ends the process for some damaged ones.

Format: FileMetaData of parquet.thrift in Thrift's compact protocol, its length in 4 bytes, `PAR1`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

_MAGIC = b"PAR1"
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 0, 1, 2, 3, 7, 8, 12
_INTEGERS, _LISTS = (4, 5, 6), (9, 10)
_DEEPEST = 16
# Fields of FileMetaData, RowGroup, ColumnChunk, ColumnMetaData and SizeStatistics.
_ROW_GROUPS, _COLUMNS, _META_DATA, _SIZE_STATISTICS = 4, 1, 3, 16
_ENCODINGS, _PATH, _NUM_VALUES, _UNCOMPRESSED, _COMPRESSED = 2, 3, 5, 6, 7
_UNENCODED_BYTES, _REPETITIONS, _DEFINITIONS = 1, 2, 3
_NAMES = {0: "PLAIN", 2: "PLAIN_DICTIONARY", 3: "RLE", 8: "RLE_DICTIONARY", 9: "BYTE_STREAM_SPLIT"}


@dataclass(frozen=True)
class ColumnChunk:
    """What a footer says of one column of a row group. path: such as `token_ids.list.element`."""

    path: str
    encodings: tuple[str, ...]
    n_values: int
    compressed: int
    uncompressed: int


def read_chunks(stream: BinaryIO) -> list[ColumnChunk]:
    """Every column of every row group. Raises ValueError, EOFError or TypeError if the footer is damaged."""
    size = stream.seek(0, 2)
    stream.seek(max(0, size - 8))
    tail = stream.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length + 12 > size:
        raise ValueError("it does not end as a Parquet file")
    stream.seek(size - 8 - length)
    fields = _Reader(stream.read(length)).struct()
    return [_chunk(column[_META_DATA]) for group in fields.get(_ROW_GROUPS, []) for column in group.get(_COLUMNS, [])]


def _chunk(fields: dict[int, Any]) -> ColumnChunk:
    path = ".".join(part.decode() for part in fields[_PATH])
    encodings = tuple(_NAMES.get(number, f"encoding {number}") for number in fields[_ENCODINGS])
    n_lists = path.count(".list.element")
    sizes = fields.get(_SIZE_STATISTICS, {})
    levels = ((_REPETITIONS, n_lists + 1), (_DEFINITIONS, 2 * n_lists + 2))
    if any(len(sizes.get(field, [])) not in (0, expected) for field, expected in levels):
        raise ValueError(f"{path} has histograms of other levels")
    if _UNENCODED_BYTES in sizes and n_lists:
        raise ValueError(f"{path} has the statistics of a column of strings")
    numbers = [fields[field] for field in (_NUM_VALUES, _COMPRESSED, _UNCOMPRESSED)]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{path} has sizes {numbers}")
    return ColumnChunk(path, encodings, *numbers)


class _Reader:
    """Thrift's compact protocol: structs as dicts by the number of the field."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place, self._depth = data, 0, 0

    def struct(self) -> dict[int, Any]:
        """The fields of the struct that begins here."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError("its footer is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._take(1)[0]) != _STOP:
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind)
        self._depth -= 1
        return fields

    def _value(self, kind: int) -> Any:
        if kind in _INTEGERS:
            return self._integer()
        if kind == _BINARY:
            return self._take(self._varint())
        if kind in _LISTS:
            return list(self._list())
        if kind == _STRUCT:
            return self.struct()
        sizes = {_BYTE: 1, _DOUBLE: 8, _TRUE: 1, _FALSE: 1}
        if kind not in sizes:
            raise ValueError(f"its footer has a field of kind {kind}")
        return self._take(sizes[kind])

    def _list(self) -> Iterator[Any]:
        head = self._take(1)[0]
        size = head >> 4 if head >> 4 != 15 else self._varint()
        for _ in range(size):
            yield self._value(head & 15)

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("its footer has a number of more than 64 bits")

    def _take(self, n_bytes: int) -> bytes:
        taken = self._data[self._place : self._place + n_bytes]
        if len(taken) != n_bytes:
            raise EOFError("its footer ends too early")
        self._place += n_bytes
        return taken
