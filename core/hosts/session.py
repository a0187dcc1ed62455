"""One stream that the hosts of a slice extract together: what each has stored, who stops, and how each ended."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from core.base.errors import RunError, is_fault_of_the_machine
from core.hosts.pod_slice import Hosts

_POLL_S = 0.5


@dataclass(frozen=True)
class Ending:
    """How a host left a session.

    Attributes:
      error: in one line; None if there was none. of_machine: whether it comes from that host rather than from the data.
    """

    error: str | None = None
    of_machine: bool = False


class HostSession:
    """The first host gathers what the others have stored, and says what stands.

    Args:
      name: of its own for each session of a run.
      stop: set when this host is to stop.

    Attributes:
      stop: set when any host is to stop, or has failed.
    """

    def __init__(self, hosts: Hosts, name: str, stop: threading.Event) -> None:
        self.hosts = hosts
        self.name = name
        self.stop = StopOfAny(hosts, name, stop)

    def __enter__(self) -> "HostSession":
        self.hosts.begin_session(self.name)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            self.hosts.tell(f"stopping/{self.name}", True)
            self._tell_end(Ending(str(error) or type(error).__name__, is_fault_of_the_machine(error)))
        elif error is None:
            self._tell_end(Ending())
            # What the first host says of the end holds for all: an error of another one is its own, even if this
            # host stopped because of it before it missed a part.
            others = range(1, self.hosts.count) if self.hosts.is_first else (0,)
            endings = [(host, Ending(**self.hosts.wait_for(self._key("ended", host)))) for host in others]
            if self.hosts.is_first:
                # The others may still have to read how this one ended.
                self.hosts.forget_earlier_sessions()
            for host, ending in endings:
                _raise_error_of(host, ending)

    def gather(self, key: str, value: Any) -> list[Any] | None:
        """What every host gives for `key`, in their order, at the first host; an empty list at the others.

        None if a host has ended without it. Raises RunError if one ended with an error.
        """
        if self.hosts.count == 1:
            return [value]
        if not self.hosts.is_first:
            self.hosts.tell(self._key(key, self.hosts.number), value)
            return []
        values = [value, *(self._from(host, self._key(key, host)) for host in range(1, self.hosts.count))]
        for host in range(1, self.hosts.count):
            self.hosts.forget(self._key(key, host))
        return None if None in values else values

    def agree(self, key: str, value: Callable[[], Any]) -> Any:
        """What the first host's `value()` gives, at every host. Raises RunError if the first host has ended."""
        if self.hosts.is_first:
            return self.share(key, value())
        told = self.share(key, None)
        if told is None:
            raise RunError(f"host 0 has given up {key}")
        return told

    def share(self, key: str, value: Any | None) -> Any | None:
        """What the first host gives for `key`, at every host; None if it gives None or has ended."""
        if self.hosts.is_first:
            if value is not None:
                self.hosts.tell(self._key(key), value)
            return value
        return self.hosts.wait_for(self._key(key), lambda: 0 not in self._endings())

    def forget(self, key: str) -> None:
        """Removes what was shared, once every host has gathered what comes behind it."""
        if self.hosts.is_first:
            self.hosts.forget(self._key(key))

    def _tell_end(self, ending: Ending) -> None:
        self.hosts.tell(self._key("ended", self.hosts.number), asdict(ending))

    def _from(self, host: int, key: str) -> Any | None:
        value = self.hosts.wait_for(key, lambda: host not in self._endings())
        ending = self._endings().get(host)
        if value is None and ending is not None:
            _raise_error_of(host, ending)
        return value

    def _endings(self) -> dict[int, Ending]:
        return {int(host): Ending(**ending) for host, ending in self.hosts.told(self._key("ended")).items()}

    def _key(self, *parts: object) -> str:
        return "/".join(map(str, (self.name, *parts)))


def _raise_error_of(host: int, ending: Ending) -> None:
    if ending.error is not None:
        # What an error comes from tells a bad shard from a bad machine.
        raise RunError(f"host {host}: {ending.error}") from (OSError(ending.error) if ending.of_machine else None)


class StopOfAny(threading.Event):
    """Set when this host is to stop, which it tells the others as soon as it is asked, or when another has told so.

    scope: what is to stop: the name of a session, or one for the whole run.
    """

    def __init__(self, hosts: Hosts, scope: str, own: threading.Event) -> None:
        super().__init__()
        self._hosts = hosts
        self._scope = scope
        self._own = own

    def is_set(self) -> bool:
        if self._own.is_set() and not super().is_set():
            self.set()
            self._hosts.tell(f"stopping/{self._scope}", True)
        return super().is_set() or self._hosts.is_stopping(self._scope)

    def wait(self, timeout: float | None = None) -> bool:
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not self.is_set() and (left := end - time.monotonic()) > 0:
            super().wait(min(left, _POLL_S))
        return self.is_set()
