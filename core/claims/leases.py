"""Leases on dataset shards: who works on what, so that workers that share nothing but storage do not repeat each other.

A lease is a numbered file, see `core.claims.records`; its number is its epoch. The latest one holds the shard until it
is released, or until an observer has seen no new sign of life for the TTL by its own monotonic clock; wall clocks are
never compared. A sign of life is seen in the listing of all claims, as a new version of a file: watching a thousand
leases costs no more than watching one. Whoever creates the next epoch has the shard: create-only, so exactly one does.
A lease saves work and guards nothing: that two workers who both believe to hold a shard do no harm is the commit
protocol's business. Nor is a lease believed that was released as "done": whether a shard is finished is asked of its
output, so that a shard whose output was lost is free again.

A sign of life says that the work goes on, not that a process exists: an owner whose work makes no progress for
`stall_s` falls silent, and the shard passes to another one.
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
"""Longer than what may hold everything up: compiling a large program, or one upload with all its repetitions."""

_ERROR_CHARS = 500
_READ_THREADS = 16
# A listing takes a request for 1,000 names, about three names a shard. Of more shards than this it is made less often,
# so that no waiting worker makes more than 15 requests a heartbeat.
SHARDS_A_HEARTBEAT = 5000
# A heartbeat that hangs in a stalled request must not hold up a worker that is told to go.
_LAST_BEAT_S = 5.0


@dataclass
class _Observation:
    """A lease's number and last sign of life, since when it has shown this one, and when it was last looked at."""

    mark: tuple[int, str | None]
    since: float
    until: float


class Lease:
    """A claimed shard. Inside its `with` block a thread gives signs of life while the work makes progress.

    Attributes:
      lost: set when somebody has taken the shard over: stop working on it.
      report: what to publish beside the heartbeat's counter, such as samples done; set it at any time. The work makes
        progress while this changes.
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
        """The lease's number."""
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
            # It expires by itself; what ended the block must not be hidden.
            logging.warning("%s: could not be released: %s", self.shard, error)

    def is_held(self) -> bool:
        """Looks whether nobody has taken the shard over, and sets `lost` if somebody has."""
        if not self.lost.is_set() and self._store.info(lease_file(self.shard, self.epoch + 1, "json")) is not None:
            logging.warning("%s: another worker has taken it over", self.shard)
            self.lost.set()
        return not self.lost.is_set()

    def release(self, reason: Reason) -> None:
        """Gives the shard back, once; with "done" for as long as its output stays complete."""
        if not self._released.acquire(blocking=False):
            return
        data = sealed_json({"reason": reason, "owner": asdict(self.record.owner)})
        fault_point("release.before")
        self._store.create_bytes(lease_file(self.shard, self.epoch, "released"), data)
        fault_point("release.after")

    def abandon(self) -> None:
        """Gives the shard back from another thread while the work is still under way: the process is about to end."""
        self._ended.set()
        if self.is_held():
            self.release("stopped")

    def beat(self) -> None:
        """Gives one sign of life, unless the shard is lost or the work stands still."""
        if self.is_held() and self._is_progressing():
            self._beats += 1
            seconds = round(self._clock() - self._started, 3)
            sign = {"beat": self._beats, "seconds": seconds, "owner": self.record.owner.nonce} | self._last_report
            fault_point("beat.before")
            self._store.replace_bytes(lease_file(self.shard, self.epoch, "beat"), sealed_json(sign))
            fault_point("beat.after")

    def _is_progressing(self) -> bool:
        report = self.report()
        if report != self._last_report:
            self._last_report, self._moved_at = report, self._clock()
        was_stalled, self._is_stalled = self._is_stalled, self._clock() - self._moved_at >= self._stall_s
        if self._is_stalled and not was_stalled:
            logging.error(
                "%s: no progress for %.0f s: no more signs of life, so that another worker can take it over",
                self.shard,
                self._stall_s,
            )
        return not self._is_stalled

    def _heartbeat_loop(self) -> None:
        while not self._ended.wait(self.record.heartbeat_s) and not self.lost.is_set():
            try:
                self.beat()
            except Exception as error:
                # A missed heartbeat may cost the lease, never the work: what is committed stays.
                logging.warning("%s: no heartbeat this time: %s", self.shard, error)


@dataclass
class ShardClaims:
    """The claims in an output folder, as one owner sees and makes them.

    Attributes:
      is_finished: whether a shard's output is complete, whatever its claims say.
      ttl_s: how long this owner watches a silent lease before it takes the shard over.
      heartbeat_s: between signs of life of its own leases, and between looks at those of others.
      stall_s: without progress for so long, its own leases fall silent.
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
    """The shards found poisoned, with the error that they fail with."""
    _finished: set[str] = field(default_factory=set)
    _observations: dict[str, _Observation] = field(default_factory=dict)

    def next(
        self, shards: Sequence[str], preferred: str | None = None, stop: threading.Event | None = None
    ) -> Lease | None:
        """Claims a shard: the preferred one if it is free, else another, else one whose lease expires.

        Waits while all that is left is held by others, and takes a lease over at the second look at the latest that
        comes after it has been silent for the TTL. None when every shard is finished or set aside, or once `stop` is
        set.
        """
        stop = stop or threading.Event()
        is_waiting = False
        while not stop.is_set():
            lease = self.try_next(shards, preferred, stop)
            if lease is not None or not self._open(shards):
                return lease
            if not is_waiting:
                left = self._open(shards)
                logging.info(
                    "waiting: other workers hold what is left: %s%s", ", ".join(left[:5]), ", …" * (len(left) > 5)
                )
                is_waiting = True
            stop.wait(poll_interval_s(self.heartbeat_s, len(shards)))
        return None

    def try_next(
        self, shards: Sequence[str], preferred: str | None = None, stop: threading.Event | None = None
    ) -> Lease | None:
        """One look of `next`, without waiting: None also when all that is left is held by others.

        What nobody has touched comes before what was given back, but for the preferred shard.
        """
        states = self._look(shards)
        first = {shard: state for shard, state in states.items() if shard == preferred or _is_unclaimed(state)}
        # Telling which of the others are done takes several requests each, so they are asked for when these are gone.
        for some in (first, {shard: state for shard, state in states.items() if shard not in first}):
            for shard, state in self._in_order(shards, self._unsettled(some), preferred):
                lease = None if stop is not None and stop.is_set() else self._try(shard, state)
                if lease is not None:
                    return lease
        return None

    def left(self, shards: Sequence[str]) -> list[str]:
        """The shards that are neither done nor set aside, by a fresh look at the claims and what they call done."""
        return list(self._unsettled(self._look(shards)))

    def any_remaining(self, shards: Sequence[str]) -> bool:
        """Whether `left` names a shard; one request where nobody has touched some shard yet."""
        states = self._look(shards)
        return any(map(_is_unclaimed, states.values())) or bool(self._unsettled(states))

    def record_failure(self, lease: Lease, error: str) -> None:
        """Notes that the shard's data met an error; after the third that is the same the shard is set aside."""
        content = {"error": error[:_ERROR_CHARS], "owner": asdict(self.owner), "epoch": lease.epoch}
        number = len(read_claims(self.store).get(lease.shard, ClaimState()).failures)
        fault_point("failure.before")
        while self._create(failure_file(lease.shard, number), content) is Created.ALREADY_DIFFERENT:
            number += 1
        fault_point("failure.after")

    def _create(self, name: str, content: dict[str, Any]) -> Created:
        return self.store.create_bytes(name, sealed_json(content))

    def _open(self, shards: Iterable[str]) -> list[str]:
        return [shard for shard in shards if shard not in self._finished and shard not in self.set_aside]

    def _look(self, shards: Sequence[str]) -> dict[str, ClaimState]:
        """The claims of every shard that this owner does not know to be done or set aside."""
        asked_at = self.clock()
        claims = read_claims(self.store)
        self._watch(claims, asked_at)
        # Whoever clears the failures of a shard gives it back to those who run.
        for shard in [shard for shard in self.set_aside if not claims.get(shard, ClaimState()).failures]:
            del self.set_aside[shard]
        return {shard: claims.get(shard, ClaimState()) for shard in self._open(shards)}

    def _watch(self, claims: dict[str, ClaimState], asked_at: float) -> None:
        """Notes what every lease shows. It has been seen from when a listing came back to when the last one began."""
        now = self.clock()
        for shard, state in claims.items():
            mark = (state.epoch, state.sign)
            known = self._observations.get(shard)
            since = known.since if known is not None and known.mark == mark else now
            self._observations[shard] = _Observation(mark, since, asked_at)

    def _unsettled(self, states: dict[str, ClaimState]) -> dict[str, ClaimState]:
        """Those that are still to be done; one that was finished without a release is among them."""
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            settled = pool.map(lambda item: self._settle(*item), states.items())
            return {
                shard: state
                for (shard, state), is_settled in zip(states.items(), settled, strict=True)
                if not is_settled
            }

    def _settle(self, shard: str, state: ClaimState) -> bool:
        """Whether a shard is set aside, or done by its claims and its output; remembers it."""
        if self._was_released_as_done(shard, state) and self.is_finished(shard):
            self._finished.add(shard)
            return True
        error = poison_error(self.store, shard, state)
        if error is None:
            return False
        if not state.is_poisoned:
            # By whoever sees it first: the one that met the error the last time may be gone.
            self._create(poisoned_file(shard), {"error": error, "failures": len(state.failures)})
        self.set_aside[shard] = error
        return True

    def _was_released_as_done(self, shard: str, state: ClaimState) -> bool:
        return state.is_released and read_release(self.store, shard, state.epoch) == "done"

    def _in_order(
        self, shards: Sequence[str], states: dict[str, ClaimState], preferred: str | None
    ) -> list[tuple[str, ClaimState]]:
        """The preferred shard, this worker's own place, then any order; failed ones after those, held ones last.

        Workers with different ids begin at different shards, and those with the same id part after the first race.
        """
        own = shards[self.owner.worker_id % len(shards)] if shards else None
        shuffled = sorted(states)
        random.Random(self.owner.nonce).shuffle(shuffled)

        def rank(shard: str) -> tuple[bool, bool, bool, bool]:
            return states[shard].is_held, bool(states[shard].failures), shard != preferred, shard != own

        return [(shard, states[shard]) for shard in sorted(shuffled, key=rank)]

    def _try(self, shard: str, state: ClaimState) -> Lease | None:
        if state.is_held and not self._has_expired(shard):
            return None
        if self.is_finished(shard):
            self._finished.add(shard)
            return None
        return self._claim(shard, state)

    def _has_expired(self, shard: str) -> bool:
        """Whether no sign of life has come for the TTL since this owner first saw the last one."""
        sighting = self._observations[shard]
        return sighting.until - sighting.since >= self.ttl_s

    def _claim(self, shard: str, state: ClaimState) -> Lease | None:
        replaces = read_lease(self.store, shard, state.epoch).owner if state.epoch else None
        record = LeaseRecord(shard, state.epoch + 1, self.owner, replaces, self.heartbeat_s, self.ttl_s)
        fault_point("claim.before")
        outcome = self._create(lease_file(shard, record.epoch, "json"), asdict(record))
        fault_point("claim.after")
        # "Already there, and the same": it carries this owner's nonce, so an earlier reply to this owner was lost.
        if outcome is Created.ALREADY_DIFFERENT:
            return None
        if state.is_held and replaces:
            logging.info("%s: taken over from %s, silent for %.0f s", shard, replaces, self.ttl_s)
        return Lease(self.store, record, self.stall_s, self.clock)


def poll_interval_s(heartbeat_s: float, n_shards: float) -> float:
    """Seconds between the looks of a worker that waits, in a dataset of so many shards."""
    return heartbeat_s * max(1.0, n_shards / SHARDS_A_HEARTBEAT)


def _is_unclaimed(state: ClaimState) -> bool:
    return state == ClaimState()
