"""Merges numbered values in a tree whose shape depends on their number alone.

Level 0 has the values 0 to n - 1. Number i of the next level is the merge of numbers 2 i and 2 i + 1; the last one goes
up as it is where it has no neighbour. So a run of 2^k values that begins at a multiple of 2^k may be merged elsewhere,
by a tree of its own: it is number i of level k.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class MergeTree(Generic[Value]):
    """Takes values in any order and merges neighbours as soon as both are there.

    It holds at most about log2(count) values where they come in order, and as many again for each gap.
    """

    def __init__(self, count: int, merge: Callable[[Value, Value], Value]) -> None:
        """count: of the values; at least 1."""
        self._count, self._merge = count, merge
        self._held: dict[tuple[int, int], Value] = {}
        self._root: list[Value] = []
        self._added: set[int] = set()

    @property
    def n_held(self) -> int:
        """Values in memory now."""
        return len(self._held) + len(self._root)

    def add(self, number: int, value: Value) -> None:
        """Adds value `number`, each once."""
        if number in self._added or not 0 <= number < self._count:
            raise ValueError(f"value {number} of {self._count} was added twice, or is none of them")
        self._added.add(number)
        level, width = 0, self._count
        while width > 1:
            sibling = number ^ 1
            if sibling < width:
                if (level, sibling) not in self._held:
                    self._held[level, number] = value
                    return
                other = self._held.pop((level, sibling))
                value = self._merge(other, value) if sibling < number else self._merge(value, other)
            level, number, width = level + 1, number >> 1, (width + 1) >> 1
        self._root.append(value)

    def root(self) -> Value:
        """The merge of all values. Raises ValueError while some are missing."""
        if not self._root:
            raise ValueError(f"{self._count - len(self._added)} of {self._count} values are missing")
        return self._root[0]
