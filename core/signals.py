"""SIGTERM and Ctrl-C as a request to stop in good order."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from absl import logging


@contextmanager
def stop_on_signals(on_stop: Callable[[str], None] = logging.warning) -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets: the run ends after what it can commit. A second Ctrl-C ends it at once."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        on_stop(f"{signal.Signals(number).name}: committing what is computed, then stopping")

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
