"""How far a fleet is, from its output alone: commit records, claims and signs of life.

What never changes is read once: a refresh costs one listing, the records that are new, and a sign of life for each
shard that is being worked on. Times are those of the storage, compared with its own clock.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import count, takewhile
from typing import Any

from absl import logging

from analysis.fleet_status.report import Commit, FleetStatus, ShardStatus, fleet_status
from analysis.verification.stored_identity import StoredDatasetShard, read_dataset_shards, read_stream
from analysis.verification.stream_shares import share_faults
from core.base.errors import RunError, UsageError
from core.claims.records import (
    ClaimState,
    LeaseRecord,
    claims_among,
    clear_failures,
    lease_file,
    poison_of,
    read_beat,
    read_lease,
)
from core.commit.identity import StreamIdentity
from core.commit.output_identity import DATASET_FILE, RUN_FILE, STREAM_FILE
from core.commit.record import RECORD_NAME, CommitRecord
from core.object_store import Listing, ObjectStore, open_store
from core.shards.names import shard_stem
from core.streams.sharded_dataset import SHARD_NAME

_READ_THREADS = 16


def status(url: str) -> FleetStatus:
    """How far the run is whose output is at `url`. Raises UsageError when there is none."""
    return FleetWatch(open_store(url.rstrip("/"))).look()


def watch(url: str, every_s: float, sleep: Callable[[float], None] = time.sleep) -> Iterator[FleetStatus]:
    """The status again and again, until nothing more can happen. What fails on the way is reported and tried again.

    A run that has not begun yet is waited for: its workers load the model before they write anything.
    """
    fleet = FleetWatch(open_store(url.rstrip("/")))
    while not fleet.has_begun():
        logging.info("%s: no run here yet: waiting for %s", url, RUN_FILE)
        sleep(every_s)
    seen = fleet.look()
    yield seen
    while not seen.settled:
        sleep(every_s)
        try:
            seen = fleet.look()
        except UsageError:
            raise
        except RunError as error:
            logging.warning("%s", error)
        else:
            yield seen


def retry(url: str, shards: Sequence[str]) -> dict[str, int]:
    """Forgets the failures of shards that were set aside, so that they are claimed again; returns how many each had.

    Raises UsageError for what is no shard of the run.
    """
    store = open_store(url.rstrip("/"))
    if store.info(DATASET_FILE) is None:
        raise UsageError(f"{url}: no run over a sharded dataset here: name the folder that holds {DATASET_FILE}")
    known = read_dataset_shards(store)
    for shard in shards:
        if shard not in known:
            raise UsageError(f"{shard}: no shard of {url}; they are named like {next(iter(known), 'shard_000')}")
    return {shard: clear_failures(store, shard) for shard in shards}


@dataclass(frozen=True)
class _Sight:
    """One listing: when each name was last written, by the storage's clock, and what that clock says now."""

    modified: dict[str, float]
    now: float

    @classmethod
    def of(cls, listing: Listing) -> "_Sight":
        return cls({entry.name: entry.modified for entry in listing.entries}, listing.now)

    def age(self, *names: str) -> float:
        """Seconds since the last write to one of the names."""
        return round(max(self.now - max(self.modified.get(name, 0.0) for name in names), 0.0), 1)

    def record_names(self) -> dict[str, list[str]]:
        """By folder, the names of its records up to the first that is missing, in window order."""
        folders = {_folder(name) for name in self.modified if RECORD_NAME.fullmatch(name.rpartition("/")[2])} - {""}
        return {folder: self._records_of(folder) for folder in sorted(folders)}

    def _records_of(self, folder: str) -> list[str]:
        return list(takewhile(self.modified.__contains__, (f"{folder}/{shard_stem(n)}.json" for n in count(1))))

    def streams(self) -> list[str]:
        """The folders of workers."""
        return sorted(_folder(name) for name in self.modified if name.endswith(f"/{STREAM_FILE}"))


@dataclass
class FleetWatch:
    """Looks at an output again and again; remembers what cannot change."""

    store: ObjectStore
    _dataset: dict[str, StoredDatasetShard] | None = None
    _streams: dict[str, StreamIdentity] = field(default_factory=dict)
    _records: dict[tuple[str, float], CommitRecord | str] = field(default_factory=dict)
    _leases: dict[tuple[str, int], LeaseRecord] = field(default_factory=dict)
    _beats: dict[str, tuple[float, dict[str, int]]] = field(default_factory=dict)
    _poison: dict[str, str] = field(default_factory=dict)

    def has_begun(self) -> bool:
        """Whether a run has declared itself in the output."""
        return self.store.info(RUN_FILE) is not None

    def look(self) -> FleetStatus:
        """The present state. Raises UsageError when there is no run, RunError when it cannot be read."""
        sight = _Sight.of(self.store.listing())
        if RUN_FILE not in sight.modified:
            raise UsageError(f"{self.store.url}: no run here: name the folder that holds {RUN_FILE}")
        records = sight.record_names()
        commits = self._read_records([(name, sight.modified[name]) for names in records.values() for name in names])
        streams = sight.streams()
        if DATASET_FILE not in sight.modified and not any(map(SHARD_NAME.fullmatch, streams)):
            folders = [self._stream(folder, records.get(folder, []), sight) for folder in streams]
            notes = share_faults({folder.shard: self._plan(folder.shard) for folder in folders}).unfinished
            return fleet_status(self.store.url, folders, commits, sight.now, notes)
        self._dataset = self._dataset or read_dataset_shards(self.store)
        claims = claims_among(sight.modified)
        items = [(shard, claims.get(shard, ClaimState()), records.get(shard, [])) for shard in self._dataset]
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            shards = list(pool.map(lambda item: self._shard(item[0], item[1], item[2], sight), items))
        return fleet_status(self.store.url, shards, commits, sight.now)

    def _read_records(self, wanted: Sequence[tuple[str, float]]) -> list[Commit]:
        """Reads those that are new, and says of all of them when and how much, in the order of time."""
        new = [key for key in wanted if key not in self._records]
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            self._records.update(zip(new, pool.map(lambda key: self._read_record(key[0]), new), strict=True))
        read = ((at, self._records[name, at]) for name, at in wanted)
        commits = [Commit(at, r.n_samples, r.n_seen) for at, r in read if isinstance(r, CommitRecord)]
        return sorted(commits, key=lambda commit: commit.at)

    def _read_record(self, name: str) -> CommitRecord | str:
        """The record, or what is wrong with it."""
        try:
            return CommitRecord.from_bytes(self.store.read_bytes(name))
        except FileNotFoundError:
            return f"{name} is gone"
        except (ValueError, OSError) as error:
            return f"{name}: {error}"

    def _committed(self, names: Sequence[str], sight: _Sight) -> tuple[list[CommitRecord], str | None]:
        """What a run would build on, as `stored_records.committed_records` has it, and what ends it early."""
        records: list[CommitRecord] = []
        for name in names:
            record = self._records[name, sight.modified[name]]
            if isinstance(record, str):
                return records, record
            files = (f"{_folder(name)}/{file.name}" for file in record.files)
            missing = next((file for file in files if file not in sight.modified), None)
            if missing is not None:
                return records, f"{missing} is missing"
            records.append(record)
        return records, None

    def _plan(self, folder: str) -> StreamIdentity:
        if folder not in self._streams:
            self._streams[folder] = read_stream(self.store, folder).stream
        return self._streams[folder]

    def _stream(self, folder: str, names: list[str], sight: _Sight) -> ShardStatus:
        records, damage = self._committed(names, sight)
        counts = _counts(records)
        if _is_finished(records):
            return ShardStatus(folder, "finished", expected_samples=counts["samples"], **counts)
        silent_s = sight.age(names[-1]) if names else None
        return ShardStatus(folder, "unfinished", silent_s=silent_s, error=damage, **counts)

    def _shard(self, shard: str, state: ClaimState, names: list[str], sight: _Sight) -> ShardStatus:
        assert self._dataset is not None
        records, damage = self._committed(names, sight)
        counts = _counts(records)
        found = ShardStatus(shard, "waiting", lease=state.epoch, failures=len(state.failures), error=damage, **counts)
        if _is_finished(records):
            return replace(found, state="finished", expected_samples=found.samples, **self._owner(found))
        per_record = self._samples_per_record()
        if per_record is not None:
            stored = self._dataset[shard]
            start, end = (place * per_record for place in (stored.first_task, stored.first_task + stored.num_tasks))
            place = records[-1].next_place if records else None
            left = end - (place.sample_idx if place else start)
            found = replace(found, expected_samples=found.samples + max(left, 0))
        return self._claimed(found, state, sight)

    def _samples_per_record(self) -> int | None:
        """The same throughout a dataset; any record says it."""
        records = (record for record in self._records.values() if isinstance(record, CommitRecord) and record.n_samples)
        return next((record.samples_per_record for record in records), None)

    def _claimed(self, found: ShardStatus, state: ClaimState, sight: _Sight) -> ShardStatus:
        """Adds what the claims say: whose the shard is, whether that one lives, why it is set aside."""
        error = self._poisoned_by(found.shard, state)
        found = replace(found, **self._owner(found))
        if error is not None:
            return replace(found, state="poisoned", error=error)
        if not state.is_held:
            return found
        beat = lease_file(found.shard, state.epoch, "beat")
        silent_s = sight.age(beat, lease_file(found.shard, state.epoch, "json"))
        lives = silent_s <= self._lease(found.shard, state.epoch).ttl_s
        return replace(
            found,
            state="running" if lives else "abandoned",
            silent_s=silent_s,
            computed_samples=self._beat(found.shard, state.epoch, sight.modified.get(beat)).get("computed_samples", 0),
        )

    def _owner(self, found: ShardStatus) -> dict[str, Any]:
        if not found.lease:
            return {}
        owner = asdict(self._lease(found.shard, found.lease).owner)
        return {"owner": {name: owner[name] for name in ("worker_id", "host", "pid")}}

    def _lease(self, shard: str, epoch: int) -> LeaseRecord:
        if (shard, epoch) not in self._leases:
            self._leases[shard, epoch] = read_lease(self.store, shard, epoch)
        return self._leases[shard, epoch]

    def _beat(self, shard: str, epoch: int, at: float | None) -> dict[str, int]:
        if at is None:
            return {}
        if self._beats.get(shard, (None, {}))[0] != at:
            self._beats[shard] = at, read_beat(self.store, shard, epoch)
        return self._beats[shard][1]

    def _poisoned_by(self, shard: str, state: ClaimState) -> str | None:
        """For what the shard is set aside; None when it is not, or no longer."""
        if not state.failures and not state.is_poisoned:
            self._poison.pop(shard, None)
        elif shard not in self._poison:
            error = poison_of(self.store, shard, state)
            if error is not None:
                self._poison[shard] = error
        return self._poison.get(shard)


def _is_finished(records: Sequence[CommitRecord]) -> bool:
    return bool(records) and records[-1].next_place is None


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _counts(records: Sequence[CommitRecord]) -> dict[str, Any]:
    return {
        "samples": sum(record.n_samples for record in records),
        "tokens": sum(record.n_seen for record in records),
        "windows": len(records),
        "bytes": sum(file.bytes for record in records for file in record.files),
    }
