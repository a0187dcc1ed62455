"""SIGTERM and Ctrl-C as a request to stop in good order, with an end that comes whatever the run is doing."""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from absl import logging

STOP_GRACE_S = 15.0
"""What is left to finish in; a preempted machine is gone 20 to 30 s after the signal."""
# For the last words and for giving the lease back, which may hang in a stalled request.
_ABANDON_S = 3.0
_ONE_REQUEST_S = 3.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# In place of a signal: another host has got one.
_TOLD = 0
_ASK_EVERY_S = 1.0


def _nothing() -> None:
    pass


@contextmanager
def stop_on_signals(
    grace_s: float = STOP_GRACE_S,
    *,
    abandon: Callable[[], None] = _nothing,
    say: Callable[[str], None] = logging.warning,
    is_told: Callable[[], bool] | None = None,
) -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets: the run is to end after what it can commit.

    If the block has not ended `grace_s` later, or at a second signal, `abandon` is called, for at most a few seconds,
    and the process exits with 128 + the signal's number: nothing half-written counts, see the commit protocol. Must be
    entered in the main thread.

    is_told: asked every second whether another host stops, which counts as SIGTERM here; the signal itself may follow.
    """
    stop = threading.Event()
    watch = _Watch(stop, grace_s, abandon, say, is_told)
    before = {number: signal.signal(number, _ignore) for number in _SIGNALS}
    try:
        with watch:
            yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(number: int, frame: object) -> None:
    """Only keeps the default action away: the signal has gone through the wakeup descriptor already."""


class _Watch:
    """A thread that learns of signals by itself.

    Python runs signal handlers in the main thread between two instructions, and that thread may be inside a compiler or
    a driver for minutes. What runs at once is the write to the wakeup descriptor.
    """

    def __init__(
        self,
        stop: threading.Event,
        grace_s: float,
        abandon: Callable[[], None],
        say: Callable[[str], None],
        is_told: Callable[[], bool] | None,
    ) -> None:
        self._stop = stop
        self._grace_s = grace_s
        self._abandon = abandon
        self._say = say
        self._is_told = is_told
        self._received, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)

    def __enter__(self) -> "_Watch":
        self._before = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        self._ended.set()
        self._wakeup.send(b"\0")
        self._thread.join()
        self._received.close()
        self._wakeup.close()

    def _run(self) -> None:
        first = self._first_signal()
        if first is None:
            return
        self._stop.set()
        reason = "another host stops" if first == _TOLD else signal.Signals(first).name
        self._say(f"{reason}: committing what is computed, then stopping")
        asked = time.monotonic()
        deadline = asked + self._grace_s
        second = self._next_signal(deadline)
        if first == _TOLD and second is not None:
            # What the other host got has come here, too.
            first, asked, second = second, time.monotonic(), self._next_signal(deadline)
        # The end of a machine signals the worker, its guard and its supervisor, which both pass it on.
        while second == signal.SIGTERM and time.monotonic() < asked + _ONE_REQUEST_S:
            second = self._next_signal(deadline)
        if not self._ended.is_set():
            self._give_up(second or first or signal.SIGTERM)

    def _first_signal(self) -> int | None:
        """The first SIGTERM or SIGINT, or _TOLD; None when the block has ended."""
        while not self._ended.is_set():
            number = self._next_signal(None if self._is_told is None else time.monotonic() + _ASK_EVERY_S)
            if number is not None:
                return number
            if self._is_told is not None and self._is_told():
                return _TOLD
        return None

    def _next_signal(self, deadline: float | None) -> int | None:
        """The next SIGTERM or SIGINT; None when the block has ended or the deadline has come."""
        while not self._ended.is_set():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            if select.select([self._received], [], [], left)[0]:
                number = self._received.recv(1)[0]
                if number in _SIGNALS:
                    return number
        return None

    def _give_up(self, number: int) -> None:
        last = threading.Thread(target=self._last_words, args=(number,), daemon=True)
        last.start()
        last.join(_ABANDON_S)
        os._exit(128 + number)

    def _last_words(self, number: int) -> None:
        name = signal.Signals(number).name
        self._say(f"{name}: what is under way is given up; the same command goes on behind the last commit")
        self._abandon()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
