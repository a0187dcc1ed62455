"""SIGTERM and Ctrl-C request an orderly stop; after a grace period the process exits whatever it is doing."""

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
"""Seconds left to finish; a preempted machine is gone 20 to 30 s after the signal."""
# For shutdown logging and for releasing the lease, which may hang in a stalled request.
_ABANDON_S = 3.0
# SIGTERMs this close together are one request.
_SAME_REQUEST_S = 3.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# In place of a signal: another host received one.
_PEER_STOP = 0
_POLL_S = 1.0


def _do_nothing() -> None:
    pass


@contextmanager
def stop_on_signals(
    grace_s: float = STOP_GRACE_S,
    *,
    abandon: Callable[[], None] = _do_nothing,
    log: Callable[[str], None] = logging.warning,
    peer_stopping: Callable[[], bool] | None = None,
) -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets: the run should commit what it can, then stop.

    If the block has not ended `grace_s` later, or at a second signal, `abandon` is called, for at most a few seconds,
    and the process exits with 128 + the signal's number: files without a commit record do not count. Python
    delivers signals to the main thread alone: entered in another one, as a notebook may, the event is never set.

    peer_stopping: polled every second; True when another host is stopping, which counts as SIGTERM here. The signal
    itself may follow.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    thread = _SignalThread(stop, grace_s, abandon, log, peer_stopping)
    before = {signum: signal.signal(signum, _ignore) for signum in _SIGNALS}
    try:
        with thread:
            yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _ignore(signum: int, frame: object) -> None:
    """Replaces the default action only: the wakeup descriptor has carried the signal already."""


class _SignalThread:
    """A thread that receives signals through the wakeup descriptor.

    Python runs signal handlers in the main thread between two instructions, and that thread may be inside a compiler or
    a driver for minutes. The write to the wakeup descriptor happens at once.
    """

    def __init__(
        self,
        stop: threading.Event,
        grace_s: float,
        abandon: Callable[[], None],
        log: Callable[[str], None],
        peer_stopping: Callable[[], bool] | None,
    ) -> None:
        self._stop = stop
        self._grace_s = grace_s
        self._abandon = abandon
        self._log = log
        self._peer_stopping = peer_stopping
        self._received, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)

    def __enter__(self) -> "_SignalThread":
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
        reason = "another host is stopping" if first == _PEER_STOP else signal.Signals(first).name
        self._log(f"{reason}: committing what is computed, then stopping")
        requested = time.monotonic()
        deadline = requested + self._grace_s
        second = self._next_signal(deadline)
        if first == _PEER_STOP and second is not None:
            # The signal that the other host received has arrived here, too.
            first, requested, second = second, time.monotonic(), self._next_signal(deadline)
        # When a machine shuts down, the worker, its guard and its supervisor are signalled, and the latter two forward.
        while second == signal.SIGTERM and time.monotonic() < requested + _SAME_REQUEST_S:
            second = self._next_signal(deadline)
        if not self._ended.is_set():
            self._abandon_and_exit(second or first or signal.SIGTERM)

    def _first_signal(self) -> int | None:
        """The first SIGTERM or SIGINT, or _PEER_STOP; None when the block has ended."""
        while not self._ended.is_set():
            signum = self._next_signal(None if self._peer_stopping is None else time.monotonic() + _POLL_S)
            if signum is not None:
                return signum
            if self._peer_stopping is not None and self._peer_stopping():
                return _PEER_STOP
        return None

    def _next_signal(self, deadline: float | None) -> int | None:
        """The next SIGTERM or SIGINT; None when the block has ended or the deadline has come."""
        while not self._ended.is_set():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            if select.select([self._received], [], [], left)[0]:
                signum = self._received.recv(1)[0]
                if signum in _SIGNALS:
                    return signum
        return None

    def _abandon_and_exit(self, signum: int) -> None:
        abandoning = threading.Thread(target=self._log_and_abandon, args=(signum,), daemon=True)
        abandoning.start()
        abandoning.join(_ABANDON_S)
        os._exit(128 + signum)

    def _log_and_abandon(self, signum: int) -> None:
        name = signal.Signals(signum).name
        self._log(f"{name}: dropping uncommitted work; run the same command to continue after the last commit")
        self._abandon()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
