"""Stages that run concurrently, joined by bounded channels.

Each stage runs in its own thread, reads one channel and writes another. A full channel blocks its writer, so memory
stays bounded however uneven the stages are. The first error in any stage stops all of them.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Aborted(Exception):
    """Raised in a stage whose pipeline has failed elsewhere; ends the stage without an error of its own."""


class StageClock:
    """Busy and waiting seconds of one stage.

    A stage with a thread is busy whenever it is not waiting for a channel; work done elsewhere (a device, a thread
    pool) is timed there and added.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting = 0.0
        self._added = 0.0
        self._running_since: float | None = None

    def start(self) -> None:
        """Starts the clock."""
        self._running_since = time.monotonic()

    def stop(self) -> None:
        """Stops the clock; the seconds so far stay."""
        if self._running_since is not None:
            self._added += time.monotonic() - self._running_since
            self._running_since = None

    def add_busy(self, seconds: float) -> None:
        """Adds work that is timed elsewhere."""
        self._added += seconds

    @property
    def busy(self) -> float:
        """Seconds spent working, up to now."""
        running = time.monotonic() - self._running_since if self._running_since is not None else 0.0
        return max(0.0, self._added + running - self.waiting)


class Pipeline:
    """The stages of one run, their clocks and the error that ended them."""

    def __init__(self) -> None:
        self.clocks: dict[str, StageClock] = {}
        self._condition = threading.Condition()
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def clock(self, name: str) -> StageClock:
        """The clock of stage `name`, made at its first use."""
        return self.clocks.setdefault(name, StageClock(name))

    def channel(self, capacity: int) -> "Channel":
        """A bounded channel whose waiting stages wake up when the pipeline fails."""
        return Channel(capacity, self)

    def start(self, name: str, stage: Callable[[StageClock], None]) -> None:
        """Runs `stage(clock)` in a thread; its error becomes the pipeline's."""
        clock = self.clock(name)

        def run() -> None:
            clock.start()
            try:
                stage(clock)
            except Aborted:
                pass
            except BaseException as error:
                self.fail(error)
            finally:
                clock.stop()

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def fail(self, error: BaseException) -> None:
        """Stops every stage; the first error is the one that `join` raises."""
        with self._condition:
            self._error = self._error or error
            self._condition.notify_all()

    def check(self) -> None:
        """Raises Aborted when the pipeline has failed."""
        if self._error is not None:
            raise Aborted

    def join(self) -> None:
        """Waits for every stage, then raises the first error."""
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error


class Channel(Generic[Item]):
    """A bounded queue that can be closed. Waiting time is added to the clock of the waiting stage."""

    def __init__(self, capacity: int, pipeline: Pipeline) -> None:
        self._items: deque[Item] = deque()
        self._capacity = capacity
        self._closed = False
        self._pipeline = pipeline
        self._condition = pipeline._condition

    def put(self, item: Item, clock: StageClock) -> None:
        """Appends `item`, waiting for room."""
        with self._condition:
            self._wait(lambda: len(self._items) < self._capacity, clock)
            self._items.append(item)
            self._condition.notify_all()

    def close(self) -> None:
        """Marks the end: no more items will be put."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def drain(self, clock: StageClock) -> Iterator[Item]:
        """Yields items until the channel is closed and empty."""
        while True:
            with self._condition:
                self._wait(lambda: bool(self._items) or self._closed, clock)
                if not self._items:
                    return
                taken = [self._items.popleft()]
                self._condition.notify_all()
            # The reader alone keeps the item alive: a stage that holds a window while it waits would cost its memory.
            yield taken.pop()

    def _wait(self, ready: Callable[[], bool], clock: StageClock) -> None:
        started = time.monotonic()
        self._condition.wait_for(lambda: ready() or self._pipeline._error is not None)
        clock.waiting += time.monotonic() - started
        self._pipeline.check()
