"""The hosts of a pod slice that work on a run together; they communicate through JAX's coordination service.

Activations and weights never travel this way: only coordination does, a few hundred bytes for each window.
Every host sends heartbeats and monitors the others: when one stops sending them, or fails, the others exit too.
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
# How long one blocking read waits; between two of them a host checks whether the others are still alive.
_POLL_MS = 500
# For an orderly shutdown once another host has failed, and for shutdown logging.
_SHUTDOWN_S = 10.0
_ABANDON_S = 3.0
_JOIN_S = 300


class KeyValueService(Protocol):
    """The part of JAX's coordination client that is used here."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...
    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...
    def key_value_delete(self, key: str) -> None: ...


class Hosts:
    """All hosts of a run, seen from host `host_id`. A context manager: leaving it waits for all hosts.

    Args:
      service: None for a single host.
      timeout_s: a host without a heartbeat for this long is dead, and this one exits.

    Attributes:
      abandon: called before the process exits because of another host.
    """

    def __init__(
        self, count: int = 1, host_id: int = 0, service: KeyValueService | None = None, timeout_s: float = 60.0
    ) -> None:
        self.count = count
        self.host_id = host_id
        self.abandon: Callable[[], None] = lambda: None
        self._service = service
        self._timeout_s = timeout_s
        self._left = threading.Event()
        self._failure: str | None = None
        self._stopping: frozenset[str] = frozenset()
        self._sessions: list[str] = []
        self._rounds = 0
        loops = (self._heartbeat_loop, self._watchdog_loop)
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]

    @property
    def is_first(self) -> bool:
        """Whether this is host 0, which writes what is written once for all hosts."""
        return self.host_id == 0

    def __enter__(self) -> "Hosts":
        for thread in self._threads if self._service is not None else ():
            thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._service is None:
            return
        with suppress(RuntimeError):  # the service is gone: report the error that led here instead
            if self._wait_for_all_to_leave(error):
                # The heartbeat thread may not have run since a host failed within the last second.
                self._check_for_failures()
                self._left.set()
                leave_hosts()
            else:
                # At process exit JAX would wait for the stuck host, and abort.
                atexit.register(_exit_now, getattr(error, "exit_code", 1))
        self._left.set()
        if error is None:
            self.check()

    def _wait_for_all_to_leave(self, error: BaseException | None) -> bool:
        """Waits for all hosts to leave; a live host may still have much to store, so the wait has no limit.

        After an error the wait is short, and False means that a host is stuck: JAX would wait for it, and abort.
        """
        if error is not None:
            self._set(f"failed/{self.host_id}", str(error) or type(error).__name__)
        self._set(f"left/{self.host_id}", "")
        deadline = math.inf if error is None else time.monotonic() + _SHUTDOWN_S / 2
        while len(self._get_all("left/")) < self.count:
            if time.monotonic() > deadline:
                return False
            time.sleep(_BEAT_S / 10)
        return True

    def broadcast(self, key: str, value: Callable[[], Any]) -> Any:
        """Host 0's `value()`, after a round trip through JSON, on all hosts. Raises RunError if a host fails."""
        if self._service is None:
            return value()
        if self.is_first:
            result = value()
            self._set(key, json.dumps(result))
            return result
        return self.wait_for(key)

    def publish(self, key: str, value: Any) -> None:
        """Sets a JSON value that other hosts may wait for."""
        if self._service is not None:
            self._set(key, json.dumps(value))

    def wait_for(self, key: str, keep_waiting: Callable[[], bool] = lambda: True) -> Any:
        """The value published under `key`; None once `keep_waiting` returns False. Raises RunError if a host fails."""
        while True:
            self.check()
            # Asked before the read: a value published before the answer is still found.
            is_last_try = not keep_waiting()
            with suppress(TimeoutError):
                return json.loads(self._get(key))
            if is_last_try:
                return None

    def published(self, folder: str) -> dict[str, Any]:
        """The values published under keys that begin with `folder`/, by the last part of the key."""
        return {} if self._service is None else {k: json.loads(v) for k, v in self._get_all(f"{folder}/").items()}

    def delete(self, key: str) -> None:
        """Deletes a key that every host has read, and all keys below it."""
        if self._service is not None:
            self._service.key_value_delete(_key(key))

    def begin_session(self, name: str) -> None:
        """Notes that this host has entered a session."""
        self._sessions.append(name)

    def delete_earlier_sessions(self) -> None:
        """Deletes the keys of all sessions before the last one, which every host has finished."""
        *earlier, last = self._sessions
        for name in earlier:
            for key in (name, f"session/{name}", f"stopping/{name}"):
                self.delete(key)
        self._sessions = [last]

    def stop_requested(self, session: str) -> bool:
        """Whether a host requested the end of a session, as of the last heartbeat."""
        return session in self._stopping

    def stop_poller(self, session: str) -> Callable[[], bool] | None:
        """A function that returns `stop_requested(session)`; None for a single host."""
        return None if self._service is None else lambda: self.stop_requested(session)

    def check(self) -> None:
        """Raises RunError when another host has failed."""
        if self._failure is not None:
            # A host fails the run only for machine errors, never for a dataset shard's data: OSError marks it so.
            raise RunError(self._failure) from OSError(self._failure)

    def _get(self, key: str) -> str:
        assert self._service is not None
        try:
            return self._service.blocking_key_value_get(_key(key), _POLL_MS)
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                raise TimeoutError from error
            raise

    def _set(self, key: str, value: str) -> None:
        assert self._service is not None
        self._service.key_value_set(_key(key), value.encode(errors="replace").decode(), allow_overwrite=True)

    def _get_all(self, folder: str) -> dict[str, str]:
        assert self._service is not None
        return {key.rpartition("/")[2]: value for key, value in self._service.key_value_dir_get(_key(folder))}

    def _heartbeat_loop(self) -> None:
        """Sends heartbeats, and checks for hosts that stopped sending them or failed."""
        seen = {str(host): ("", time.monotonic()) for host in range(self.count)}
        try:
            while not self._left.wait(_BEAT_S):
                self._set(f"beat/{self.host_id}", str(self._rounds))
                self._check_for_failures()
                self._stopping = frozenset(self._get_all("stopping/"))
                self._check_heartbeats(seen)
                self._rounds += 1
        except RuntimeError as error:
            self._exit_unless_left(f"the hosts cannot reach each other ({str(error).splitlines()[0]})")

    def _check_heartbeats(self, seen: dict[str, tuple[str, float]]) -> None:
        """seen: by host, the last heartbeat and when it was first seen."""
        now = time.monotonic()
        for host, beat in self._get_all("beat/").items():
            if host not in seen or seen[host][0] != beat:
                seen[host] = beat, now
        silent = [host for host, (_, since) in seen.items() if now - since > self._timeout_s]
        # A host that has left sends no more heartbeats, and waits for the others.
        for host in sorted(set(silent) - self._get_all("left/").keys()):
            self._exit_unless_left(f"host {host} has sent no heartbeat for {self._timeout_s:.0f} s")

    def _watchdog_loop(self) -> None:
        """Exits when host 0 hangs: the service hangs with it, and so does the heartbeat thread.

        Time is counted in ticks of this thread, so that time in which this process itself was stopped does not count.
        """
        rounds, ticks = self._rounds, 0
        while not self._left.wait(_BEAT_S):
            ticks = ticks + 1 if self._rounds == rounds else 0
            rounds = self._rounds
            if ticks * _BEAT_S > self._timeout_s:
                self._exit_unless_left(f"host 0 has not responded for {self._timeout_s:.0f} s")

    def _check_for_failures(self) -> None:
        failures = {host: text for host, text in self._get_all("failed/").items() if host != str(self.host_id)}
        if failures and self._failure is None:
            host, text = min(failures.items())
            self._failure = f"host {host}: {text}"
            timer = threading.Timer(_SHUTDOWN_S, self._exit_unless_left, (f"host {host} failed ({text})",))
            timer.daemon = True
            timer.start()

    def _exit_unless_left(self, reason: str) -> None:
        if not self._left.is_set():
            self._exit(reason)

    def _exit(self, reason: str) -> None:
        """Exits at once: files without a commit record do not count, so nothing needs to be finished first."""
        logging.error(
            "%s: this host exits too; run the same command on all hosts to continue after the last commit", reason
        )
        abandoning = threading.Thread(target=self.abandon, daemon=True)
        abandoning.start()
        abandoning.join(_ABANDON_S)
        _exit_now(1)


def _exit_now(code: int) -> None:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


SINGLE_HOST = Hosts()


def _key(key: str) -> str:
    return f"extract_activations/{key}"


def join_hosts(coordinator_address: str | None, num_hosts: int | None, host_id: int | None, timeout_s: float) -> Hosts:
    """Joins the hosts of a pod slice. On a TPU VM JAX finds the arguments that are None.

    Must be called before anything touches a device. Raises UsageError when JAX cannot find the hosts. When one does
    not join within five minutes, JAX itself ends the process.
    """
    import jax
    from jax._src import distributed  # the service's client has no public name

    # Its SIGTERM handler would replace ours, which commits what is computed.
    jax.config.update("jax_enable_preemption_service", False)
    # The service aborts a process whose coordinator is gone: the stacks of all threads would bury the reason.
    faulthandler.disable()
    # While JAX waits, Python runs no signal handler.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes=num_hosts,
            process_id=host_id,
            initialization_timeout=_JOIN_S,
            # Our own heartbeat check comes first; this one applies when the service itself does not respond.
            heartbeat_timeout_seconds=int(2 * timeout_s) + 10,
            shutdown_timeout_seconds=int(_SHUTDOWN_S),
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--multihost: cannot join the other hosts ({reason}): "
            "pass --coordinator_address, --num_hosts and --host_id"
        ) from error
    finally:
        signal.signal(signal.SIGINT, interrupt)
    state = distributed.global_state
    return Hosts(state.num_processes, state.process_id, state.client, timeout_s)


def leave_hosts() -> None:
    """Disconnects from the other hosts."""
    import jax

    jax.distributed.shutdown()
