"""A pool of processes on this machine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from analysis.passes.runners.base import Item, Output
from analysis.passes.runners.blas_threads import keep_one_blas_thread
from analysis.passes.runners.in_flight import completed
from core.base.command_line import configure_logging
from core.base.errors import RunError


@dataclass(frozen=True)
class ProcessRunner:
    """Spawned processes: a forked one would inherit threads and connections that do not work there."""

    workers: int

    def run(self, task: Callable[[Item], Output], items: Iterable[Item]) -> Iterator[Output]:
        """See `Runner`. Raises RunError when a process dies."""
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_begin, initargs=(task,))
        try:
            yield from completed(pool, _apply, items, self.workers)
        except BrokenProcessPool as error:
            raise RunError(
                "a worker process died, perhaps for want of memory: run the same command again to continue, "
                "with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# What this process applies: sent once, since it may hold a matrix.
_task: Callable[[Any], Any]


def _apply(item: Any) -> Any:
    return _task(item)


def _begin(task: Callable[[Any], Any]) -> None:
    global _task
    _task = task
    configure_logging()
    # Ctrl-C is the parent's, which then ends the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_one_blas_thread()
    threading.Thread(target=_end_with_parent, name="parent watch", daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed tells its children nothing: they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
