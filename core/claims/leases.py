"""Leases on dataset shards, so that workers that share nothing but storage do not do the same work twice.

A lease is a file named by its epoch (1, 2, …), see `core.claims.records`. The latest one holds the shard until it is
released, or until an observer has seen no new heartbeat for the TTL by its own monotonic clock; wall clocks are never
compared. Heartbeats are read from the listing of all claims, as new versions of a file: observing a thousand leases
costs no more than observing one. The worker that creates the next epoch holds the shard: creation is exclusive, so
exactly one does. Leases avoid duplicate work; commits ensure correctness, even when two workers both think that they
hold a shard. A release as "done" is not trusted either: the output decides whether a shard is finished, so a shard
whose output was lost is free again.

A heartbeat means that the work progresses, not that a process exists: an owner without progress for `stall_s` stops
sending heartbeats, and another worker takes the shard over.
"""

import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from absl import logging

from core.base.canonical_json import sealed_json
from core.base.errors import RunError
from core.base.fault_points import fault_point
from core.claims.records import (
    ClaimState,
    LeaseRecord,
    Owner,
    Reason,
    failure_file,
    lease_file,
    poison_error,
    poisoned_file,
    read_claims,
    read_lease,
    read_release,
)
from core.object_store import Created, ObjectStore

DEFAULT_HEARTBEAT_S = 20.0
DEFAULT_TTL_S = 90.0
DEFAULT_STALL_S = 1800.0
"""Longer than anything that may block all progress: compiling a large program, or one upload with all its retries."""

_ERROR_CHARS = 500
_READ_THREADS = 16
# A listing takes a request per 1,000 names, and a shard has about three names. With more shards than this, claims are
# listed less often, so that no waiting worker makes more than 15 requests per heartbeat.
SHARDS_A_HEARTBEAT = 5000
# A heartbeat that hangs in a stalled request must not delay a worker that is asked to stop.
_LAST_BEAT_S = 5.0


@dataclass
class _Observation:
    """A lease's epoch and last heartbeat, when they were first seen, and when they were last seen unchanged."""

    mark: tuple[int, str | None]
    since: float
    until: float


class Lease:
    """A claimed shard. Inside its `with` block a thread sends heartbeats while the work progresses.

    Attributes:
      lost: set when another worker has taken the shard over: stop working on it.
      report: returns what to store with the heartbeat, such as the number of samples done; may be set at any time. The
        work progresses as long as its result changes.
    """

    def __init__(
        self, store: ObjectStore, record: LeaseRecord, stall_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.record = record
        self.lost = threading.Event()
        self.report: Callable[[], dict[str, Any]] = dict
        self._store = store
        self._stall_s = stall_s
        self._clock = clock
        self._released = threading.Lock()
        self._ended = threading.Event()
        self._started = self._moved_at = clock()
        self._last_report: dict[str, Any] = {}
        self._is_stalled = False
        self._beats = 0
        self._thread = threading.Thread(target=self._heartbeat_loop, name="heartbeat", daemon=True)

    @property
    def shard(self) -> str:
        """The shard's name."""
        return self.record.shard

    @property
    def epoch(self) -> int:
        """The lease's epoch."""
        return self.record.epoch

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join(_LAST_BEAT_S)
        try:
            if self.is_held():
                self.release("failed" if kind is not None and issubclass(kind, Exception) else "stopped")
        except RunError as error:
            # The lease expires by itself; an exception of the block must not be hidden.
            logging.warning("%s: cannot release the lease: %s", self.shard, error)

    def is_held(self) -> bool:
        """Checks that no other worker has taken the shard over; sets `lost` if one has."""
        if not self.lost.is_set() and self._store.info(lease_file(self.shard, self.epoch + 1, "json")) is not None:
            logging.warning("%s: another worker has taken it over", self.shard)
            self.lost.set()
        return not self.lost.is_set()

    def release(self, reason: Reason) -> None:
        """Releases the shard, once; "done" holds as long as its output stays complete."""
        if not self._released.acquire(blocking=False):
            return
        data = sealed_json({"reason": reason, "owner": asdict(self.record.owner)})
        fault_point("release.before")
        self._store.create_bytes(lease_file(self.shard, self.epoch, "released"), data)
        fault_point("release.after")

    def abandon(self) -> None:
        """Releases the shard from another thread while work is in progress, because the process is about to exit."""
        self._ended.set()
        if self.is_held():
            self.release("stopped")

    def beat(self) -> None:
        """Sends one heartbeat, unless the shard is lost or the work is stalled."""
        if self.is_held() and self._is_progressing():
            self._beats += 1
            seconds = round(self._clock() - self._started, 3)
            beat = {"beat": self._beats, "seconds": seconds, "owner": self.record.owner.nonce} | self._last_report
            fault_point("beat.before")
            self._store.replace_bytes(lease_file(self.shard, self.epoch, "beat"), sealed_json(beat))
            fault_point("beat.after")

    def _is_progressing(self) -> bool:
        report = self.report()
        if report != self._last_report:
            self._last_report, self._moved_at = report, self._clock()
        was_stalled, self._is_stalled = self._is_stalled, self._clock() - self._moved_at >= self._stall_s
        if self._is_stalled and not was_stalled:
            logging.error(
                "%s: no progress for %.0f s: heartbeats stop, so that another worker can take it over",
                self.shard,
                self._stall_s,
            )
        return not self._is_stalled

    def _heartbeat_loop(self) -> None:
        while not self._ended.wait(self.record.heartbeat_s) and not self.lost.is_set():
            try:
                self.beat()
            except Exception as error:
                # A missed heartbeat may cost the lease, but no committed work.
                logging.warning("%s: a heartbeat failed: %s", self.shard, error)


@dataclass
class ShardClaims:
    """The claims in an output folder, as one owner sees and makes them.

    Attributes:
      is_finished: whether a shard's output is complete, regardless of its claims.
      ttl_s: how long this owner observes a lease without a heartbeat before it takes the shard over.
      heartbeat_s: interval of its own heartbeats, and of polling the claims of others.
      stall_s: without progress for this long, its own heartbeats stop.
      clock: monotonic seconds.
    """

    store: ObjectStore
    owner: Owner
    is_finished: Callable[[str], bool]
    ttl_s: float = DEFAULT_TTL_S
    heartbeat_s: float = DEFAULT_HEARTBEAT_S
    stall_s: float = DEFAULT_STALL_S
    clock: Callable[[], float] = time.monotonic
    set_aside: dict[str, str] = field(default_factory=dict)
    """The poisoned shards that this owner found, with their errors."""
    _finished: set[str] = field(default_factory=set)
    _observations: dict[str, _Observation] = field(default_factory=dict)

    def next(
        self, shards: Sequence[str], preferred: str | None = None, stop: threading.Event | None = None
    ) -> Lease | None:
        """Claims a shard: the preferred one if it is free, else another, else one whose lease expires.

        Waits while others hold all remaining shards. A lease without a heartbeat for the TTL is taken over at the
        second poll after that at the latest. None when every shard is finished or set aside, or once `stop` is set.
        """
        stop = stop or threading.Event()
        is_waiting = False
        while not stop.is_set():
            lease = self.try_next(shards, preferred, stop)
            if lease is not None or not self._pending(shards):
                return lease
            if not is_waiting:
                left = self._pending(shards)
                logging.info(
                    "waiting: other workers hold the remaining shards: %s%s",
                    ", ".join(left[:5]),
                    ", …" * (len(left) > 5),
                )
                is_waiting = True
            stop.wait(poll_interval_s(self.heartbeat_s, len(shards)))
        return None

    def try_next(
        self, shards: Sequence[str], preferred: str | None = None, stop: threading.Event | None = None
    ) -> Lease | None:
        """One attempt of `next`, without waiting: also None when others hold all remaining shards.

        Except for the preferred shard, shards that were never claimed come before released ones.
        """
        states = self._list_claims(shards)
        first = {shard: state for shard, state in states.items() if shard == preferred or _is_unclaimed(state)}
        # Finding out which of the others are done takes several requests for each, so they come last.
        for some in (first, {shard: state for shard, state in states.items() if shard not in first}):
            for shard, state in self._in_order(shards, self._unsettled(some), preferred):
                lease = None if stop is not None and stop.is_set() else self._try_claim(shard, state)
                if lease is not None:
                    return lease
        return None

    def remaining(self, shards: Sequence[str]) -> list[str]:
        """The shards that are neither done nor set aside; lists the claims, and checks the output of those "done"."""
        return list(self._unsettled(self._list_claims(shards)))

    def any_remaining(self, shards: Sequence[str]) -> bool:
        """Whether `remaining` is not empty; a single request while some shard was never claimed."""
        states = self._list_claims(shards)
        return any(map(_is_unclaimed, states.values())) or bool(self._unsettled(states))

    def record_failure(self, lease: Lease, error: str) -> None:
        """Records an error of the shard's data; at the third identical one the shard is set aside."""
        content = {"error": error[:_ERROR_CHARS], "owner": asdict(self.owner), "epoch": lease.epoch}
        index = len(read_claims(self.store).get(lease.shard, ClaimState()).failures)
        fault_point("failure.before")
        while self._create(failure_file(lease.shard, index), content) is Created.ALREADY_DIFFERENT:
            index += 1
        fault_point("failure.after")

    def _create(self, name: str, content: dict[str, Any]) -> Created:
        return self.store.create_bytes(name, sealed_json(content))

    def _pending(self, shards: Iterable[str]) -> list[str]:
        return [shard for shard in shards if shard not in self._finished and shard not in self.set_aside]

    def _list_claims(self, shards: Sequence[str]) -> dict[str, ClaimState]:
        """The claims of every shard that this owner does not know to be done or set aside."""
        asked_at = self.clock()
        claims = read_claims(self.store)
        self._observe(claims, asked_at)
        # A shard whose failures were cleared is free again, also for workers that are running.
        for shard in [shard for shard in self.set_aside if not claims.get(shard, ClaimState()).failures]:
            del self.set_aside[shard]
        return {shard: claims.get(shard, ClaimState()) for shard in self._pending(shards)}

    def _observe(self, claims: dict[str, ClaimState], asked_at: float) -> None:
        """Notes every lease's last heartbeat: seen from the end of its first listing to the start of the latest one."""
        now = self.clock()
        for shard, state in claims.items():
            mark = (state.epoch, state.beat)
            known = self._observations.get(shard)
            since = known.since if known is not None and known.mark == mark else now
            self._observations[shard] = _Observation(mark, since, asked_at)

    def _unsettled(self, states: dict[str, ClaimState]) -> dict[str, ClaimState]:
        """The shards that are not settled; one that was finished without a release is among them."""
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            settled = pool.map(lambda item: self._settle(*item), states.items())
            return {
                shard: state
                for (shard, state), is_settled in zip(states.items(), settled, strict=True)
                if not is_settled
            }

    def _settle(self, shard: str, state: ClaimState) -> bool:
        """Whether a shard is set aside, or done by both its claims and its output; remembers that."""
        if self._was_released_as_done(shard, state) and self.is_finished(shard):
            self._finished.add(shard)
            return True
        error = poison_error(self.store, shard, state)
        if error is None:
            return False
        if not state.is_poisoned:
            # Written by the first worker to see it: the one that recorded the last failure may be gone.
            self._create(poisoned_file(shard), {"error": error, "failures": len(state.failures)})
        self.set_aside[shard] = error
        return True

    def _was_released_as_done(self, shard: str, state: ClaimState) -> bool:
        return state.is_released and read_release(self.store, shard, state.epoch) == "done"

    def _in_order(
        self, shards: Sequence[str], states: dict[str, ClaimState], preferred: str | None
    ) -> list[tuple[str, ClaimState]]:
        """The preferred shard, the shard of this worker's id, then random order; failed ones later, held ones last.

        Workers with different ids start with different shards; those with the same id diverge after the first race.
        """
        own = shards[self.owner.worker_id % len(shards)] if shards else None
        shuffled = sorted(states)
        random.Random(self.owner.nonce).shuffle(shuffled)

        def rank(shard: str) -> tuple[bool, bool, bool, bool]:
            return states[shard].is_held, bool(states[shard].failures), shard != preferred, shard != own

        return [(shard, states[shard]) for shard in sorted(shuffled, key=rank)]

    def _try_claim(self, shard: str, state: ClaimState) -> Lease | None:
        if state.is_held and not self._has_expired(shard):
            return None
        if self.is_finished(shard):
            self._finished.add(shard)
            return None
        return self._claim(shard, state)

    def _has_expired(self, shard: str) -> bool:
        """Whether this owner has seen no new heartbeat for the TTL since it first saw the last one."""
        observed = self._observations[shard]
        return observed.until - observed.since >= self.ttl_s

    def _claim(self, shard: str, state: ClaimState) -> Lease | None:
        replaces = read_lease(self.store, shard, state.epoch).owner if state.epoch else None
        record = LeaseRecord(shard, state.epoch + 1, self.owner, replaces, self.heartbeat_s, self.ttl_s)
        fault_point("claim.before")
        outcome = self._create(lease_file(shard, record.epoch, "json"), asdict(record))
        fault_point("claim.after")
        # ALREADY_SAME means success: the record has this owner's nonce, so only the reply to a try was lost.
        if outcome is Created.ALREADY_DIFFERENT:
            return None
        if state.is_held and replaces:
            logging.info("%s: taken over from %s, no heartbeat for %.0f s", shard, replaces, self.ttl_s)
        return Lease(self.store, record, self.stall_s, self.clock)


def poll_interval_s(heartbeat_s: float, n_shards: float) -> float:
    """Seconds between two polls of a waiting worker, for a dataset of `n_shards` shards."""
    return heartbeat_s * max(1.0, n_shards / SHARDS_A_HEARTBEAT)


def _is_unclaimed(state: ClaimState) -> bool:
    return state == ClaimState()
