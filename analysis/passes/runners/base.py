"""What applies a task to items, somewhere."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Output = TypeVar("Output")


class Runner(Protocol):
    """Applies a task to items."""

    def run(self, task: Callable[[Item], Output], items: Iterable[Item]) -> Iterator[Output]:
        """The outputs in the order in which they are done; at most a fixed number of them wait or are being computed.

        The first error of a task ends it; tasks that have not begun are dropped.
        """
