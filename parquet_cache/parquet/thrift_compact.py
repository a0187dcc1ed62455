"""Thrift's compact protocol, as far as Parquet's metadata uses it: structs as dicts of their fields by number.

https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from dataclasses import dataclass
from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
_STOP = 0


@dataclass(frozen=True)
class Field:
    """A value and its type, one of the constants above."""

    kind: int
    value: Any


@dataclass(frozen=True)
class ThriftList:
    """A list and the type of its members."""

    kind: int
    members: list[Any]


Struct = dict[int, Field]


def encode_struct(struct: Struct) -> bytes:
    """The bytes of a struct; `None` is no value."""
    out = bytearray()
    _write_struct(out, struct)
    return bytes(out)


def decode_struct(data: bytes) -> Struct:
    """The struct that `data` begins with. Raises ValueError for a type that Parquet's metadata does not use."""
    return _Reader(data).struct()


def _write_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _zigzag(value: int) -> int:
    return value << 1 if value >= 0 else (-value << 1) - 1


def _write_struct(out: bytearray, struct: Struct) -> None:
    last = 0
    for number, field in sorted(struct.items()):
        step = number - last
        if 0 < step < 16:
            out.append(step << 4 | field.kind)
        else:
            out.append(field.kind)
            _write_varint(out, _zigzag(number))
        if field.kind not in (TRUE, FALSE):
            _write_value(out, field.kind, field.value)
        last = number
    out.append(_STOP)


def _write_value(out: bytearray, kind: int, value: Any) -> None:
    if kind in (I16, I32, I64):
        _write_varint(out, _zigzag(value))
    elif kind == BINARY:
        _write_varint(out, len(value))
        out += value
    elif kind == STRUCT:
        _write_struct(out, value)
    elif kind in (LIST, SET):
        n = len(value.members)
        out.append(min(n, 15) << 4 | value.kind)
        if n >= 15:
            _write_varint(out, n)
        for member in value.members:
            _write_value(out, value.kind, member)
    else:
        out += value  # a byte, a double or a bool in a list, kept as bytes


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def struct(self) -> Struct:
        fields: Struct = {}
        number = 0
        while head := self._take(1)[0]:
            kind, step = head & 15, head >> 4
            number = number + step if step else self._integer()
            fields[number] = Field(kind, None if kind in (TRUE, FALSE) else self._value(kind))
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (I16, I32, I64):
            return self._integer()
        if kind == BINARY:
            return self._take(self._varint())
        if kind == STRUCT:
            return self.struct()
        if kind in (LIST, SET):
            head = self._take(1)[0]
            n = head >> 4 if head >> 4 < 15 else self._varint()
            return ThriftList(head & 15, [self._value(head & 15) for _ in range(n)])
        if kind == MAP or kind > STRUCT:
            raise ValueError(f"thrift type {kind} at byte {self._place}: Parquet's metadata has none")
        return self._take(8 if kind == DOUBLE else 1)

    def _take(self, n: int) -> bytes:
        self._place += n
        return self._data[self._place - n : self._place]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
