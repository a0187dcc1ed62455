"""Reads pickles of plain data without unpickling them: nothing that a pickle names is imported or called.

A pickle is a program of a stack machine. This is one that knows texts, numbers, lists, tuples, dicts with texts as
keys, and the way in which numpy pickles an array of numbers; every other instruction is refused. Memory is bounded by
the size of the file and by the number of instructions, whatever sizes the pickle declares.
Opcodes: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

import io
import pickletools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MOST_BYTES = 1 << 30
"""The largest pickle that is read."""
# Two for each text in a list, and a little more. An object of an instruction takes up to 150 bytes.
_MOST_OPCODES = 1 << 23

_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"}
_LITERALS |= {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_LITERALS |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NUMPY = {("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): "dtype"}
# numpy 1 and 2 write different names.
_NUMPY |= {(f"numpy.{core}.multiarray", "_reconstruct"): "reconstruct" for core in ("core", "_core")}
_NUMBERS = ("f4", "f8", "i8")
_LITTLE_ENDIAN = (3, "<", None, None, None, -1, -1, 0)


@dataclass(frozen=True)
class _Name:
    """A thing of numpy that the pickle names."""

    name: str


@dataclass(frozen=True)
class _Call:
    """What numpy would make of a call; its state follows. `places`: where the memo has it."""

    name: str
    arguments: tuple[Any, ...]
    places: list[int] = field(default_factory=list)


def load_plain(data: bytes) -> Any:
    """The value of a pickle of plain data. Raises ValueError saying what else it holds, or where it is damaged."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has {len(data)} bytes: at most {MOST_BYTES} are read, use JSON Lines")
    machine = _Machine()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
        if count == _MOST_OPCODES:
            raise ValueError(f"it has more than {_MOST_OPCODES} instructions: use JSON Lines")
        machine.run(opcode.name, argument)
    if len(machine.stack) != 1 or machine.marks:
        raise ValueError("it does not end with one value")
    return machine.stack[0]


class _Machine:
    """The stack, the places that MARK remembers in it, and the memo of values that are referred to again."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """Runs one instruction. Raises ValueError."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _VALUES:
            self.stack.append(_VALUES[name])
        elif name in _TUPLES:
            self.stack.append(tuple(self._popped(_TUPLES[name])))
        elif name in ("STACK_GLOBAL", "GLOBAL"):
            words = self._popped(2) if name == "STACK_GLOBAL" else argument.split(" ")
            self.stack.append(_named(*words))
        elif name not in ("PROTO", "FRAME", "STOP") and not (self._contains(name) or self._remembers(name, argument)):
            self._makes_array(name)

    def _contains(self, name: str) -> bool:
        """Runs an instruction that begins or fills a container; False for any other."""
        if name == "MARK":
            self.marks.append(len(self.stack))
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            self.stack.append([] if name == "EMPTY_LIST" else {})
        elif name in ("LIST", "TUPLE"):
            values = self._since_mark()
            self.stack.append(values if name == "LIST" else tuple(values))
        elif name in ("APPEND", "APPENDS"):
            values = self._popped(1) if name == "APPEND" else self._since_mark()
            self._top(list).extend(values)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            values = self._popped(2) if name == "SETITEM" else self._since_mark()
            if name == "DICT":
                self.stack.append({})
            self._top(dict).update(_pairs(values))
        else:
            return False
        return True

    def _remembers(self, name: str, argument: Any) -> bool:
        """Runs an instruction of the memo; False for any other."""
        if name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            place, value = len(self.memo) if name == "MEMOIZE" else int(argument), self._top(object)
            self.memo[place] = value
            if isinstance(value, _Call):
                value.places.append(place)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            if int(argument) not in self.memo:
                raise ValueError("it refers to a value that it does not hold")
            self.stack.append(self.memo[int(argument)])
        else:
            return False
        return True

    def _makes_array(self, name: str) -> None:
        if name not in ("REDUCE", "BUILD"):
            raise ValueError(f"its instruction {name} is of no plain data")
        first, second = self._popped(2)
        if name == "REDUCE" and isinstance(first, _Name) and isinstance(second, tuple):
            self.stack.append(_Call(first.name, second))
        elif name == "BUILD" and isinstance(first, _Call) and isinstance(second, tuple):
            built = _built(first, second)
            self.stack.append(built)
            self.memo.update(dict.fromkeys(first.places, built))
        else:
            raise ValueError(f"its instruction {name} makes no array")

    def _popped(self, count: int) -> list[Any]:
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) - count < floor:
            raise ValueError("an instruction takes more than there is")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def _since_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("an instruction has no mark")
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def _top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError("an instruction has nothing to work on")
        return self.stack[-1]


def _named(module: Any, name: Any) -> _Name:
    found = _NUMPY.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
    if found is None:
        raise ValueError(f"it holds {module}.{name}: only texts, numbers, lists, dicts and arrays of numbers are read")
    return _Name(found)


def _pairs(values: list[Any]) -> dict[str, Any]:
    if len(values) % 2 or not all(isinstance(key, str) for key in values[::2]):
        raise ValueError("a dict of it has keys that are not texts")
    return dict(zip(values[::2], values[1::2], strict=True))


def _built(call: _Call, state: tuple[Any, ...]) -> Any:
    """A dtype or an array from what numpy stores of it."""
    if call.name == "dtype":
        kind = call.arguments[0] if call.arguments else None
        if kind not in _NUMBERS or state != _LITTLE_ENDIAN:
            raise ValueError(f"it holds an array of {kind!r}: expected one of {', '.join(_NUMBERS)}")
        return np.dtype(f"<{kind}")
    if call.name != "reconstruct" or len(state) != 5:
        raise ValueError("it holds an array that is not stored as numpy does")
    _, shape, dtype, is_fortran, data = state
    is_plain = isinstance(dtype, np.dtype) and isinstance(data, bytes) and is_fortran is False
    if not is_plain or not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("it holds an array that is not stored as numpy does")
    return np.frombuffer(data, dtype).reshape(shape)
