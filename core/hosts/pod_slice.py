"""The hosts of a pod slice that work on a run together, and how they talk: through JAX's coordination service.

Activations and weights never go this way: only what hosts have to agree about, a few hundred bytes for each window.
Every host beats, and watches the others: when one falls silent, or ends with an error, the rest end too.
"""

import atexit
import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from absl import logging

from core.base.errors import RunError, UsageError

_BEAT_S = 1.0
# How long one question to the service waits; between two of them a host looks whether the others are still there.
_POLL_MS = 500
# For a run to end in good order once another host has failed, and for the last words.
_FAREWELL_S = 10.0
_ABANDON_S = 3.0
_JOIN_S = 300


class KeyValueService(Protocol):
    """What is used of JAX's coordination client."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...
    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...
    def key_value_delete(self, key: str) -> None: ...


class Hosts:
    """The hosts of a run, as the one of that number sees them. Use it as a context: leaving it waits for all.

    Args:
      service: None for a host on its own.
      timeout_s: a host without a sign of life for so long is dead, and this one ends.

    Attributes:
      abandon: called before the process ends because of another host.
    """

    def __init__(
        self, count: int = 1, number: int = 0, service: KeyValueService | None = None, timeout_s: float = 60.0
    ) -> None:
        self.count = count
        self.number = number
        self.abandon: Callable[[], None] = lambda: None
        self._service = service
        self._timeout_s = timeout_s
        self._left = threading.Event()
        self._failure: str | None = None
        self._stopping: frozenset[str] = frozenset()
        self._sessions: list[str] = []
        self._rounds = 0
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._watch_the_watch)]

    @property
    def is_first(self) -> bool:
        """Whether this host writes what is written once for all."""
        return self.number == 0

    def __enter__(self) -> "Hosts":
        for thread in self._threads if self._service is not None else ():
            thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._service is None:
            return
        with suppress(RuntimeError):  # of a service that is gone: the error that led here is the one to be shown
            if self._all_leave(error):
                # The watch may not have come by since a host failed in the last second.
                self._look_for_failures()
                self._left.set()
                leave_hosts()
            else:
                # At the end of the process JAX would wait for the host that is stuck, and abort.
                atexit.register(_exit_at_once, getattr(error, "exit_code", 1))
        self._left.set()
        if error is None:
            self.check()

    def _all_leave(self, error: BaseException | None) -> bool:
        """Waits for all hosts to leave. One that does not, but lives, may have much left to store.

        After an error they have little time, and False says that one is stuck: JAX would wait for it, and abort.
        """
        if error is not None:
            self._say(f"failed/{self.number}", str(error) or type(error).__name__)
        self._say(f"left/{self.number}", "")
        deadline = math.inf if error is None else time.monotonic() + _FAREWELL_S / 2
        while len(self._said("left/")) < self.count:
            if time.monotonic() > deadline:
                return False
            time.sleep(_BEAT_S / 10)
        return True

    def share(self, key: str, value: Callable[[], Any]) -> Any:
        """What the first host's `value()` gives, as JSON keeps it, on all hosts. Raises RunError if a host fails."""
        if self._service is None:
            return value()
        if self.is_first:
            shared = value()
            self._say(key, json.dumps(shared))
            return shared
        return self.wait_for(key)

    def tell(self, key: str, value: Any) -> None:
        """Leaves a JSON value for other hosts to wait for."""
        if self._service is not None:
            self._say(key, json.dumps(value))

    def wait_for(self, key: str, may_go_on: Callable[[], bool] = lambda: True) -> Any:
        """What another host told under `key`; None once `may_go_on` says so. Raises RunError if a host fails."""
        while True:
            self.check()
            wait_on = may_go_on()
            with suppress(TimeoutError):
                return json.loads(self._read(key))
            if not wait_on:
                return None

    def told(self, folder: str) -> dict[str, Any]:
        """What was told under keys that begin with `folder`/, by the last part of the key."""
        return {} if self._service is None else {k: json.loads(v) for k, v in self._said(f"{folder}/").items()}

    def forget(self, key: str) -> None:
        """Removes what every host has read under a key, and under all keys that begin with it and a slash."""
        if self._service is not None:
            self._service.key_value_delete(_key(key))

    def begin_session(self, name: str) -> None:
        """Notes that this host has come to a session."""
        self._sessions.append(name)

    def forget_earlier_sessions(self) -> None:
        """Removes what was told in the sessions before the last one, to whose end all hosts have come."""
        *earlier, last = self._sessions
        for name in earlier:
            for key in (name, f"session/{name}", f"stopping/{name}"):
                self.forget(key)
        self._sessions = [last]

    def is_stopping(self, session: str) -> bool:
        """Whether a host has asked for the end of a session, a second ago or earlier."""
        return session in self._stopping

    def asks_to_stop(self, session: str) -> Callable[[], bool] | None:
        """What says whether a host has asked for the end of a session; None for a host on its own."""
        return None if self._service is None else lambda: self.is_stopping(session)

    def check(self) -> None:
        """Raises RunError when another host has ended with an error."""
        if self._failure is not None:
            # A host leaves a run for what is wrong with itself, not for what is wrong with a shard's data.
            raise RunError(self._failure) from OSError(self._failure)

    def _read(self, key: str) -> str:
        assert self._service is not None
        try:
            return self._service.blocking_key_value_get(_key(key), _POLL_MS)
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                raise TimeoutError from error
            raise

    def _say(self, key: str, value: str) -> None:
        assert self._service is not None
        self._service.key_value_set(_key(key), value.encode(errors="replace").decode(), allow_overwrite=True)

    def _said(self, folder: str) -> dict[str, str]:
        assert self._service is not None
        return {key.rpartition("/")[2]: value for key, value in self._service.key_value_dir_get(_key(folder))}

    def _watch(self) -> None:
        """Beats, and looks for hosts that have fallen silent or failed."""
        heard = {str(host): ("", time.monotonic()) for host in range(self.count)}
        try:
            while not self._left.wait(_BEAT_S):
                self._say(f"beat/{self.number}", str(self._rounds))
                self._look_for_failures()
                self._stopping = frozenset(self._said("stopping/"))
                self._look_for_silence(heard)
                self._rounds += 1
        except RuntimeError as error:
            self._end_unless_left(f"the hosts cannot reach each other ({str(error).splitlines()[0]})")

    def _look_for_silence(self, heard: dict[str, tuple[str, float]]) -> None:
        """heard: by host its last sign of life, and since when that has been the last."""
        now = time.monotonic()
        for host, sign in self._said("beat/").items():
            if host not in heard or heard[host][0] != sign:
                heard[host] = sign, now
        silent = [host for host, (_, since) in heard.items() if now - since > self._timeout_s]
        # Who has left beats no more, and waits for the rest.
        for host in sorted(set(silent) - self._said("left/").keys()):
            self._end_unless_left(f"host {host} has given no sign of life for {self._timeout_s:.0f} s")

    def _watch_the_watch(self) -> None:
        """A host 0 that hangs, and the service with it, answers no question: the watch hangs too.

        Its rounds are counted in ticks of this thread: time in which this process itself stood still does not count.
        """
        rounds, ticks = self._rounds, 0
        while not self._left.wait(_BEAT_S):
            ticks = ticks + 1 if self._rounds == rounds else 0
            rounds = self._rounds
            if ticks * _BEAT_S > self._timeout_s:
                self._end_unless_left(f"host 0 has given no answer for {self._timeout_s:.0f} s")

    def _look_for_failures(self) -> None:
        failures = {host: text for host, text in self._said("failed/").items() if host != str(self.number)}
        if failures and self._failure is None:
            host, text = min(failures.items())
            self._failure = f"host {host}: {text}"
            timer = threading.Timer(_FAREWELL_S, self._end_unless_left, (f"host {host} failed ({text})",))
            timer.daemon = True
            timer.start()

    def _end_unless_left(self, reason: str) -> None:
        if not self._left.is_set():
            self._end(reason)

    def _end(self, reason: str) -> None:
        """Ends the process: nothing half-written counts, see the commit protocol."""
        logging.error("%s: this host ends too; the same command on all hosts goes on behind the last commit", reason)
        last = threading.Thread(target=self.abandon, daemon=True)
        last.start()
        last.join(_ABANDON_S)
        _exit_at_once(1)


def _exit_at_once(code: int) -> None:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


ALONE = Hosts()


def _key(key: str) -> str:
    return f"extract_activations/{key}"


def join_hosts(coordinator_address: str | None, num_hosts: int | None, host_id: int | None, timeout_s: float) -> Hosts:
    """Joins the hosts of a pod slice; what is None is found by JAX on a TPU VM.

    Must come before anything touches a device. Raises UsageError when JAX does not find them. When one does not come
    within five minutes JAX ends the process itself.
    """
    import jax
    from jax._src import distributed  # the service's client has no public name

    # It would take SIGTERM away from this project's own way of ending.
    jax.config.update("jax_enable_preemption_service", False)
    # The service aborts a process whose coordinator is gone: the stacks of all threads would bury the reason.
    faulthandler.disable()
    # JAX waits in a place where Python handles no signal.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes=num_hosts,
            process_id=host_id,
            initialization_timeout=_JOIN_S,
            # The watch above is to speak first; this ends the hosts when the service itself does not answer.
            heartbeat_timeout_seconds=int(2 * timeout_s) + 10,
            shutdown_timeout_seconds=int(_FAREWELL_S),
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--multihost: cannot join the other hosts ({reason}): "
            "give --coordinator_address, --num_hosts and --host_id"
        ) from error
    finally:
        signal.signal(signal.SIGINT, interrupt)
    state = distributed.global_state
    return Hosts(state.num_processes, state.process_id, state.client, timeout_s)


def leave_hosts() -> None:
    """Parts from the other hosts."""
    import jax

    jax.distributed.shutdown()
