"""Futures, a fixed number of them at a time."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait

from analysis.passes.runners.base import Item, Output


def completed(pool: Executor, task: Callable[[Item], Output], items: Iterable[Item], limit: int) -> Iterator[Output]:
    """The outputs in the order in which they are done; at most `limit` are under way. The first error is raised."""
    waiting = iter(items)
    futures: set[Future[Output]] = {pool.submit(task, item) for item in itertools.islice(waiting, limit)}
    try:
        while futures:
            done, futures = wait(futures, return_when=FIRST_COMPLETED)
            for future in done:
                # The next item begins while the caller is busy with this output.
                futures |= {pool.submit(task, item) for item in itertools.islice(waiting, 1)}
                yield future.result()
            del done, future
    finally:
        for future in futures:
            future.cancel()
