"""Runs many calls of gcloud at once."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

_THREADS = 16

A = TypeVar("A")
B = TypeVar("B")


def each(items: Iterable[A], do: Callable[[A], B], *, on_interrupt: Callable[[], None]) -> list[B]:
    """The results in the order of the items; raises the first error once all have ended.

    Ctrl-C calls `on_interrupt`, which must end the running calls.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(do, item) for item in items]
        try:
            wait(futures)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            on_interrupt()
            raise
        return [future.result() for future in futures]
