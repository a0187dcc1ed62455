"""Runners in this process."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from analysis.passes.runners.base import Item, Output
from analysis.passes.runners.in_flight import completed


@dataclass(frozen=True)
class LocalRunner:
    """One item after another."""

    def run(self, task: Callable[[Item], Output], items: Iterable[Item]) -> Iterator[Output]:
        """See `Runner`."""
        return map(task, items)


@dataclass(frozen=True)
class ThreadRunner:
    """Threads of this process: for passes that decompress and hash, which hold no lock of Python."""

    workers: int

    def run(self, task: Callable[[Item], Output], items: Iterable[Item]) -> Iterator[Output]:
        """See `Runner`."""
        with ThreadPoolExecutor(self.workers) as pool:
            yield from completed(pool, task, items, self.workers)
