"""Leases on dataset shards: who works on what, so that workers that share nothing but storage do not repeat each other.

    claims/<shard>/000001.json         lease number 1: its owner, and whom it replaces; create-only
    claims/<shard>/000001.beat         its owner's last sign of life, replaced at every heartbeat
    claims/<shard>/000001.released     its end and why; create-only
    claims/<shard>/failures/000.json   an error that the shard's data met; create-only

The number of a lease is its epoch. The latest one holds the shard until it is released, or until an observer has seen
no new sign of life for the TTL by its own monotonic clock; wall clocks are never compared. Whoever creates the next
epoch has the shard: create-only, so exactly one does. A lease saves work and guards nothing: that two workers who both
believe to hold a shard do no harm is the commit protocol's business. Nor is a lease believed that was released as
"done": whether a shard is finished is asked of its output, so that a shard whose output was lost is free again.
"""

import json
import os
import random
import re
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from absl import logging

from core.errors import RunError
from core.object_store import Created, ObjectStore
from core.plan import canonical_json

CLAIMS_FOLDER = "claims"
POISON_AFTER = 3
"""A shard that fails so often with the same error is set aside."""

Reason = Literal["done", "stopped", "failed"]

_LEASE_FILE = re.compile(r"([0-9]{6,})\.(json|beat|released)")
_FAILURE_FILE = re.compile(r"failures/[0-9]{3,}\.json")
_ERROR_CHARS = 500
_READ_THREADS = 16
# A heartbeat that hangs in a stalled request must not hold up a worker that is told to go.
_LAST_BEAT_S = 5.0


@dataclass(frozen=True)
class Owner:
    """One start of one process: `nonce` tells it from every other, whatever the worker id."""

    worker_id: int
    host: str
    pid: int
    nonce: str

    @classmethod
    def of_this_process(cls, worker_id: int) -> "Owner":
        """A new owner."""
        return cls(worker_id, socket.gethostname(), os.getpid(), uuid.uuid4().hex)


@dataclass(frozen=True)
class ClaimState:
    """What the names below a shard's claims say. `epoch` 0: never claimed."""

    epoch: int = 0
    is_released: bool = False
    failures: tuple[str, ...] = ()

    @property
    def is_held(self) -> bool:
        """Whether the latest lease has not been given back; it may have expired."""
        return self.epoch > 0 and not self.is_released


@dataclass
class _Sighting:
    mark: tuple[int, bytes | None]
    since: float


class Lease:
    """A claimed shard. Inside its `with` block a thread gives signs of life.

    Attributes:
      lost: set when somebody has taken the shard over: stop working on it.
      replaces: the owner whose expired or released lease this one follows, or None.
      report: what to publish beside the heartbeat's counter, such as samples done; set it at any time.
    """

    def __init__(
        self, store: ObjectStore, shard: str, epoch: int, owner: Owner, replaces: dict[str, Any] | None, every_s: float
    ) -> None:
        self.shard = shard
        self.epoch = epoch
        self.replaces = replaces
        self.lost = threading.Event()
        self.report: Callable[[], dict[str, Any]] = dict
        self._store = store
        self._owner = owner
        self._every_s = every_s
        self._released = False
        self._ended = threading.Event()
        self._started = time.monotonic()
        self._beats = 0
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join(_LAST_BEAT_S)
        try:
            if not self._released and self.is_held():
                self.release("failed" if kind is not None and issubclass(kind, Exception) else "stopped")
        except RunError as error:
            # It expires by itself; what ended the block must not be hidden.
            logging.warning("%s: could not be released: %s", self.shard, error)

    def is_held(self) -> bool:
        """Looks whether nobody has taken the shard over, and sets `lost` if somebody has."""
        if not self.lost.is_set() and self._store.info(_lease_file(self.shard, self.epoch + 1, "json")) is not None:
            logging.warning("%s: another worker has taken it over", self.shard)
            self.lost.set()
        return not self.lost.is_set()

    def release(self, reason: Reason) -> None:
        """Gives the shard back; with "done" for as long as its output stays complete."""
        self._released = True
        data = canonical_json({"reason": reason, "owner": asdict(self._owner)})
        self._store.create_bytes(_lease_file(self.shard, self.epoch, "released"), data)

    def beat(self) -> None:
        """Gives one sign of life, unless the shard is lost."""
        if self.is_held():
            self._beats += 1
            seconds = round(time.monotonic() - self._started, 3)
            sign = {"beat": self._beats, "seconds": seconds, "owner": self._owner.nonce} | self.report()
            self._store.replace_bytes(_lease_file(self.shard, self.epoch, "beat"), canonical_json(sign))

    def _beat_on(self) -> None:
        while not self._ended.wait(self._every_s) and not self.lost.is_set():
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
      clock: monotonic seconds.
    """

    store: ObjectStore
    owner: Owner
    is_finished: Callable[[str], bool]
    ttl_s: float = 90.0
    heartbeat_s: float = 20.0
    clock: Callable[[], float] = time.monotonic
    set_aside: dict[str, str] = field(default_factory=dict)
    """The shards found poisoned, with the error that they fail with."""
    _finished: set[str] = field(default_factory=set)
    _sightings: dict[str, _Sighting] = field(default_factory=dict)

    def next(
        self, shards: Sequence[str], preferred: str | None = None, stop: threading.Event | None = None
    ) -> Lease | None:
        """Claims a shard: the preferred one if it is free, else another, else one whose lease expires.

        Waits while all that is left is held by others. None when every shard is finished or set aside, or once `stop`
        is set.
        """
        stop = stop or threading.Event()
        is_waiting = False
        while not stop.is_set():
            lease = self.try_next(shards, preferred, stop)
            if lease is not None or not self._open(shards):
                return lease
            if not is_waiting:
                logging.info("waiting: other workers hold all %d shards that are left", len(self._open(shards)))
                is_waiting = True
            stop.wait(self.heartbeat_s)
        return None

    def try_next(
        self, shards: Sequence[str], preferred: str | None = None, stop: threading.Event | None = None
    ) -> Lease | None:
        """One look of `next`, without waiting: None also when all that is left is held by others."""
        for shard, state in self._in_order(shards, self._left(shards), preferred):
            lease = None if stop is not None and stop.is_set() else self._try(shard, state)
            if lease is not None:
                return lease
        return None

    def left(self, shards: Sequence[str]) -> list[str]:
        """The shards that are neither done nor set aside, by a fresh look at the claims and what they call done."""
        return list(self._left(shards))

    def record_failure(self, lease: Lease, error: str) -> None:
        """Notes that the shard's data met an error; the third time that it is the same, the shard is set aside."""
        content = {"error": error[:_ERROR_CHARS], "owner": asdict(self.owner), "epoch": lease.epoch}
        number = len(read_claims(self.store).get(lease.shard, ClaimState()).failures)
        while (
            self.store.create_bytes(
                f"{CLAIMS_FOLDER}/{lease.shard}/failures/{number:03d}.json", canonical_json(content)
            )
            is Created.ALREADY_DIFFERENT
        ):
            number += 1

    def _open(self, shards: Iterable[str]) -> list[str]:
        return [shard for shard in shards if shard not in self._finished and shard not in self.set_aside]

    def _left(self, shards: Sequence[str]) -> dict[str, ClaimState]:
        """The claims of every shard that is still to be done; one that was finished without a release is among them."""
        claims = read_claims(self.store)
        states = {shard: claims.get(shard, ClaimState()) for shard in self._open(shards)}
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            settled = pool.map(lambda item: self._settle(*item), states.items())
            return {
                shard: state
                for (shard, state), is_settled in zip(states.items(), settled, strict=True)
                if not is_settled
            }

    def _settle(self, shard: str, state: ClaimState) -> bool:
        """Whether a shard is set aside, or done by its claims and its output; remembers it."""
        if self._is_called_done(shard, state) and self.is_finished(shard):
            self._finished.add(shard)
            return True
        if len(state.failures) >= POISON_AFTER:
            errors = Counter(self._read(name)["error"] for name in state.failures)
            error, times = errors.most_common(1)[0]
            if times >= POISON_AFTER:
                self.set_aside[shard] = error
                return True
        return False

    def _is_called_done(self, shard: str, state: ClaimState) -> bool:
        return state.is_released and self._read(_lease_file(shard, state.epoch, "released")).get("reason") == "done"

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
        if state.is_held and not self._has_expired(shard, state):
            return None
        if self.is_finished(shard):
            self._finished.add(shard)
            return None
        return self._claim(shard, state)

    def _has_expired(self, shard: str, state: ClaimState) -> bool:
        """Whether no sign of life has come for the TTL since this owner first saw the last one."""
        before = self.clock()
        try:
            beat = self.store.read_bytes(_lease_file(shard, state.epoch, "beat"))
        except FileNotFoundError:
            beat = None
        sighting = self._sightings.get(shard)
        if sighting is None or sighting.mark != (state.epoch, beat):
            self._sightings[shard] = _Sighting((state.epoch, beat), self.clock())
            return False
        return before - sighting.since >= self.ttl_s

    def _claim(self, shard: str, state: ClaimState) -> Lease | None:
        replaces = self._read(_lease_file(shard, state.epoch, "json"))["owner"] if state.epoch else None
        epoch = state.epoch + 1
        content = {"shard": shard, "epoch": epoch, "owner": asdict(self.owner), "replaces": replaces}
        outcome = self.store.create_bytes(_lease_file(shard, epoch, "json"), canonical_json(content))
        # "Already there, and the same": it carries this owner's nonce, so an earlier reply to this owner was lost.
        if outcome is Created.ALREADY_DIFFERENT:
            return None
        if state.is_held and replaces:
            logging.info(
                "%s: taken over from %s:%s, silent for %.0f s", shard, replaces["host"], replaces["pid"], self.ttl_s
            )
        return Lease(self.store, shard, epoch, self.owner, replaces, self.heartbeat_s)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return json.loads(self.store.read_bytes(name))
        except (FileNotFoundError, ValueError) as error:
            raise RunError(
                f"{self.store.url}/{name}: the claim is gone or damaged: stop all workers, remove the folder "
                f"{CLAIMS_FOLDER} and start them again; nothing that is committed is lost"
            ) from error


def read_claims(store: ObjectStore) -> dict[str, ClaimState]:
    """The claims in an output folder by shard, from one listing."""
    names: dict[str, list[str]] = {}
    for name in store.list(f"{CLAIMS_FOLDER}/"):
        _, shard, *rest = name.split("/", 2)
        names.setdefault(shard, []).extend(rest)
    return {shard: _state_of(shard, found) for shard, found in names.items()}


def _state_of(shard: str, names: list[str]) -> ClaimState:
    matches = [match for match in map(_LEASE_FILE.fullmatch, names) if match]
    epoch = max((int(match[1]) for match in matches if match[2] == "json"), default=0)
    is_released = any(int(match[1]) == epoch and match[2] == "released" for match in matches)
    failures = [f"{CLAIMS_FOLDER}/{shard}/{name}" for name in names if _FAILURE_FILE.fullmatch(name)]
    return ClaimState(epoch, is_released, tuple(sorted(failures)))


def _lease_file(shard: str, epoch: int, kind: str) -> str:
    return f"{CLAIMS_FOLDER}/{shard}/{epoch:06d}.{kind}"
