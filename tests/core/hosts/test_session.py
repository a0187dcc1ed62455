"""Hosts as threads over a service in memory, which answers as JAX's does."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from core.base.errors import RunError, is_machine_fault
from core.hosts import pod_slice as hosts_module
from core.hosts.pod_slice import SINGLE_HOST, Hosts
from core.hosts.session import HostSession, SharedStopEvent


class Service:
    """Keys and values, and waiting for a key."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self.changed:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        with self.changed:
            return [(name, value) for name, value in self.values.items() if name.startswith(key)]

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
            return self.values[key]

    def key_value_delete(self, key: str) -> None:
        with self.changed:
            gone = [name for name in self.values if name == key or name.startswith(f"{key}/")]
            for name in gone:
                del self.values[name]


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(hosts_module, "_BEAT_S", 0.05)
    monkeypatch.setattr(hosts_module, "_POLL_MS", 20)
    monkeypatch.setattr(hosts_module, "leave_hosts", lambda: None)


def together(
    n_hosts: int, work: Callable[[Hosts], object], timeout_s: float = 30.0, service: Service | None = None
) -> list[object]:
    """What `work` returned or raised on each host."""
    service = service or Service()

    def one(number: int) -> object:
        try:
            with Hosts(n_hosts, number, service, timeout_s) as hosts:
                return work(hosts)
        except Exception as error:
            return error

    with ThreadPoolExecutor(n_hosts) as pool:
        return list(pool.map(one, range(n_hosts)))


def test_what_the_first_host_finds_holds_on_all():
    assert together(3, lambda hosts: hosts.broadcast("what", lambda: [hosts.host_id, "x"])) == [[0, "x"]] * 3


def test_the_first_host_gathers_what_each_one_stored_in_their_order():
    def work(hosts: Hosts) -> object:
        with HostSession(hosts, "run", threading.Event()) as session:
            told = session.gather("stored/1", {"host": hosts.host_id})
            return told, session.try_broadcast("committed/1", told or None)

    everyone = [{"host": host} for host in range(4)]
    results = together(4, work)
    assert results[0] == (everyone, everyone)
    assert results[1:] == [([], everyone)] * 3


def test_a_window_that_one_host_does_not_finish_is_given_up_by_all():
    def work(hosts: Hosts) -> object:
        with HostSession(hosts, "run", threading.Event()) as session:
            if hosts.host_id == 2:
                return "left"
            told = session.gather("stored/1", 1)
            return session.try_broadcast("committed/1", None if told is None else told or None)

    assert together(3, work) == [None, None, "left"]


@pytest.mark.parametrize("error", [RunError("s.jsonl:3: broken"), OSError("disk gone")])
def test_an_error_of_one_host_is_raised_where_its_part_is_missed_and_keeps_its_kind(error):
    def work(hosts: Hosts) -> object:
        try:
            with HostSession(hosts, "1", threading.Event()) as session:
                if hosts.host_id == 1:
                    raise error
                return session.gather("stored/1", 1)
        except Exception as caught:
            return caught

    first, second = together(2, work)
    assert second is error
    assert str(first) == f"host 1: {error}"
    assert is_machine_fault(first) == isinstance(error, OSError)


def test_one_host_that_is_to_stop_stops_all():
    def work(hosts: Hosts) -> object:
        own = threading.Event()
        stop = SharedStopEvent(hosts, "run", own)
        hosts.broadcast("ready", lambda: True)
        if hosts.host_id == 1:
            own.set()
        return stop.wait(10)

    started = time.monotonic()
    assert together(3, work) == [True] * 3
    assert time.monotonic() - started < 5


def test_the_stop_of_a_session_is_not_that_of_the_next():
    def work(hosts: Hosts) -> object:
        lost = threading.Event()
        with HostSession(hosts, "1", lost) as session:
            if hosts.is_first:
                lost.set()
            assert session.stop.wait(10)
        with HostSession(hosts, "2", threading.Event()) as session:
            return session.stop.is_set()

    assert together(2, work) == [False, False]


def test_the_keys_of_all_sessions_but_the_last_one_are_deleted():
    service, kept = Service(), list[int]()

    def work(hosts: Hosts) -> object:
        for number in range(1, 13):
            if hosts.is_first:
                hosts.publish(f"session/{number}", f"shard_{number}")
                kept.append(len(service.values))
            else:
                assert hosts.wait_for(f"session/{number}") == f"shard_{number}"
            stop = threading.Event()
            with suppress(RunError), HostSession(hosts, str(number), stop) as session:
                session.broadcast("found", lambda: 0)
                if number == 5 and hosts.host_id == 2:
                    raise RunError("s.jsonl:3: broken")
                if number == 7 and hosts.is_first:
                    stop.set()
                    assert session.stop.is_set()
                told = session.gather("stored/1", hosts.host_id)
                session.try_broadcast("committed/1", told or None)
        return "done"

    assert together(3, work, service=service) == ["done"] * 3
    # What two sessions leave, and the heartbeats.
    assert max(kept) <= 24
    names = {name.removeprefix("extract_activations/").split("/")[0] for name in service.values}
    assert names <= {"12", "session", "beat", "left"}


def test_a_host_that_fails_outside_of_a_session_ends_those_that_wait_for_it():
    def work(hosts: Hosts) -> object:
        if hosts.host_id == 0:
            raise RunError("no such model")
        return hosts.wait_for("never")

    first, second = together(2, work)
    assert str(first) == "no such model"
    assert str(second) == "host 0: no such model"


def test_a_broadcast_that_host_0_never_makes_keeps_no_host_waiting():
    def work(hosts: Hosts) -> object:
        try:
            with HostSession(hosts, "1", threading.Event()) as session:
                if hosts.is_first:
                    raise RunError("no such shard")
                return session.broadcast("found", lambda: None)
        except RunError as error:
            return str(error)

    assert together(2, work) == ["no such shard", "host 0 left the session before it published 'found'"]


def test_a_host_that_is_done_waits_as_long_as_the_others_live():
    def work(hosts: Hosts) -> object:
        if hosts.is_first:
            time.sleep(1.0)
        return hosts.host_id

    assert together(2, work, timeout_s=0.4) == [0, 1]


def test_a_host_that_falls_silent_ends_the_process_of_the_others(monkeypatch):
    ended: list[str] = []
    monkeypatch.setattr(Hosts, "_exit", lambda self, reason: ended.append(f"{self.host_id}: {reason}"))
    service = Service()
    service.key_value_set("extract_activations/beat/1", "7")
    with Hosts(1, 0, service, timeout_s=0.3):
        deadline = time.monotonic() + 10
        while not ended and time.monotonic() < deadline:
            time.sleep(0.02)
    assert ended[0].startswith("0: host 1 has sent no heartbeat")


def test_a_single_host_needs_no_service():
    with SINGLE_HOST, HostSession(SINGLE_HOST, "run", threading.Event()) as session:
        assert session.gather("stored/1", "part") == ["part"]
        assert session.try_broadcast("committed/1", "record") == "record"
        assert not session.stop.is_set()
