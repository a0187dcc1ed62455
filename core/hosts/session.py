"""One stream that the hosts of a slice extract together: what each stored, stop requests, and each host's outcome."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from core.base.errors import RunError, is_machine_fault
from core.hosts.pod_slice import Hosts

_POLL_S = 0.5


@dataclass(frozen=True)
class SessionOutcome:
    """How a host left a session.

    Attributes:
      error: one line; None if there was none. machine_fault: whether that host rather than the data caused it.
    """

    error: str | None = None
    machine_fault: bool = False


class HostSession:
    """Host 0 gathers what the others have stored, commits it and broadcasts the record.

    Args:
      name: unique among the sessions of a run.
      stop: set when this host should stop.

    Attributes:
      stop: set when any host should stop, or has failed.
    """

    def __init__(self, hosts: Hosts, name: str, stop: threading.Event) -> None:
        self.hosts = hosts
        self.name = name
        self.stop = SharedStopEvent(hosts, name, stop)

    def __enter__(self) -> "HostSession":
        self.hosts.begin_session(self.name)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            self.hosts.publish(f"stopping/{self.name}", True)
            self._publish_outcome(SessionOutcome(str(error) or type(error).__name__, is_machine_fault(error)))
        elif error is None:
            self._publish_outcome(SessionOutcome())
            # Host 0's outcome holds for all hosts: an error of another host is reported by host 0, even if this host
            # stopped because of that error before it missed a part.
            others = range(1, self.hosts.count) if self.hosts.is_first else (0,)
            outcomes = [(host, SessionOutcome(**self.hosts.wait_for(self._key("ended", host)))) for host in others]
            if self.hosts.is_first:
                # Not this session's keys: the others may still have to read this host's outcome.
                self.hosts.delete_earlier_sessions()
            for host, outcome in outcomes:
                _raise_failure(host, outcome)

    def gather(self, key: str, value: Any) -> list[Any] | None:
        """The `value` of every host, in host order, on host 0; an empty list on the others.

        None if a host left the session without publishing one. Raises RunError if a host failed.
        """
        if self.hosts.count == 1:
            return [value]
        if not self.hosts.is_first:
            self.hosts.publish(self._key(key, self.hosts.host_id), value)
            return []
        values = [value, *(self._receive(host, self._key(key, host)) for host in range(1, self.hosts.count))]
        for host in range(1, self.hosts.count):
            self.hosts.delete(self._key(key, host))
        return None if None in values else values

    def broadcast(self, key: str, value: Callable[[], Any]) -> Any:
        """Host 0's `value()`, on every host. Raises RunError if host 0 left the session without publishing it."""
        if self.hosts.is_first:
            return self.try_broadcast(key, value())
        received = self.try_broadcast(key, None)
        if received is None:
            raise RunError(f"host 0 left the session before it published {key!r}")
        return received

    def try_broadcast(self, key: str, value: Any | None) -> Any | None:
        """Host 0's `value`, on every host; None if that is None or host 0 left the session."""
        if self.hosts.is_first:
            if value is not None:
                self.hosts.publish(self._key(key), value)
            return value
        return self.hosts.wait_for(self._key(key), lambda: 0 not in self._outcomes())

    def delete(self, key: str) -> None:
        """Deletes a broadcast value, once a later `gather` shows that every host has read it."""
        if self.hosts.is_first:
            self.hosts.delete(self._key(key))

    def _publish_outcome(self, outcome: SessionOutcome) -> None:
        self.hosts.publish(self._key("ended", self.hosts.host_id), asdict(outcome))

    def _receive(self, host: int, key: str) -> Any | None:
        value = self.hosts.wait_for(key, lambda: host not in self._outcomes())
        outcome = self._outcomes().get(host)
        if value is None and outcome is not None:
            _raise_failure(host, outcome)
        return value

    def _outcomes(self) -> dict[int, SessionOutcome]:
        published = self.hosts.published(self._key("ended"))
        return {int(host): SessionOutcome(**outcome) for host, outcome in published.items()}

    def _key(self, *parts: object) -> str:
        return "/".join(map(str, (self.name, *parts)))


def _raise_failure(host: int, outcome: SessionOutcome) -> None:
    if outcome.error is not None:
        # An OSError as the cause marks a machine fault (`is_machine_fault`), here too.
        raise RunError(f"host {host}: {outcome.error}") from (OSError(outcome.error) if outcome.machine_fault else None)


class SharedStopEvent(threading.Event):
    """Set when this host's `local` event is set, or another host requested a stop. `is_set` publishes a local stop.

    scope: what should stop: the name of a session, or "run".
    """

    def __init__(self, hosts: Hosts, scope: str, local: threading.Event) -> None:
        super().__init__()
        self._hosts = hosts
        self._scope = scope
        self._local = local

    def is_set(self) -> bool:
        if self._local.is_set() and not super().is_set():
            self.set()
            self._hosts.publish(f"stopping/{self._scope}", True)
        return super().is_set() or self._hosts.stop_requested(self._scope)

    def wait(self, timeout: float | None = None) -> bool:
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not self.is_set() and (left := end - time.monotonic()) > 0:
            super().wait(min(left, _POLL_S))
        return self.is_set()
