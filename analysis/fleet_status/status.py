"""The status of a fleet, from its output alone: commit records, claims and heartbeats.

Immutable objects are read once: a refresh costs one listing, the new records, and the heartbeat of each shard that is
being worked on. Times are the storage's, and compared with the storage's own clock.
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
    claims_from_names,
    clear_failures,
    lease_file,
    poison_error,
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
    """The status of the run with output `url`. Raises UsageError when there is none."""
    return FleetMonitor(open_store(url.rstrip("/"))).refresh()


def watch(url: str, every_s: float, sleep: Callable[[float], None] = time.sleep) -> Iterator[FleetStatus]:
    """Yields the status repeatedly, until it is settled. Errors after the first status are logged and retried.

    Waits for a run that has not started yet: its workers load the model before they write anything.
    """
    fleet = FleetMonitor(open_store(url.rstrip("/")))
    while not fleet.has_started():
        logging.info("%s: no run here yet: waiting for %s", url, RUN_FILE)
        sleep(every_s)
    current = fleet.refresh()
    yield current
    while not current.settled:
        sleep(every_s)
        try:
            current = fleet.refresh()
        except UsageError:
            raise
        except RunError as error:
            logging.warning("%s", error)
        else:
            yield current


def retry(url: str, shards: Sequence[str]) -> dict[str, int]:
    """Deletes the failures of shards that were set aside, so that they are claimed again; returns how many each had.

    Raises UsageError for a name that is not a shard of the run.
    """
    store = open_store(url.rstrip("/"))
    if store.info(DATASET_FILE) is None:
        raise UsageError(f"{url}: no run over a sharded dataset here: pass the folder with {DATASET_FILE}")
    known = read_dataset_shards(store)
    for shard in shards:
        if shard not in known:
            raise UsageError(f"{shard}: not a shard of {url}; names are like {next(iter(known), 'shard_000')}")
    return {shard: clear_failures(store, shard) for shard in shards}


@dataclass(frozen=True)
class _Snapshot:
    """One listing: when each name was last written, and the time of the listing, both by the storage's clock."""

    modified: dict[str, float]
    now: float

    @classmethod
    def of(cls, listing: Listing) -> "_Snapshot":
        return cls({entry.name: entry.modified for entry in listing.entries}, listing.now)

    def age(self, *names: str) -> float:
        """Seconds since the last write to one of the names."""
        return round(max(self.now - max(self.modified.get(name, 0.0) for name in names), 0.0), 1)

    def record_names(self) -> dict[str, list[str]]:
        """By folder, the names of its records in window order, up to the first that is missing."""
        folders = {_folder(name) for name in self.modified if RECORD_NAME.fullmatch(name.rpartition("/")[2])} - {""}
        return {folder: self._records_of(folder) for folder in sorted(folders)}

    def _records_of(self, folder: str) -> list[str]:
        return list(takewhile(self.modified.__contains__, (f"{folder}/{shard_stem(n)}.json" for n in count(1))))

    def streams(self) -> list[str]:
        """The folders of workers."""
        return sorted(_folder(name) for name in self.modified if name.endswith(f"/{STREAM_FILE}"))


@dataclass
class FleetMonitor:
    """Reads the status of an output repeatedly; caches what cannot change."""

    store: ObjectStore
    _dataset: dict[str, StoredDatasetShard] | None = None
    _streams: dict[str, StreamIdentity] = field(default_factory=dict)
    _records: dict[tuple[str, float], CommitRecord | str] = field(default_factory=dict)
    _leases: dict[tuple[str, int], LeaseRecord] = field(default_factory=dict)
    _beats: dict[str, tuple[float, dict[str, int]]] = field(default_factory=dict)
    _poison: dict[str, str] = field(default_factory=dict)

    def has_started(self) -> bool:
        """Whether a run has written its identity into the output."""
        return self.store.info(RUN_FILE) is not None

    def refresh(self) -> FleetStatus:
        """The current status. Raises UsageError when there is no run, RunError when it cannot be read."""
        snapshot = _Snapshot.of(self.store.listing())
        if RUN_FILE not in snapshot.modified:
            raise UsageError(f"{self.store.url}: no run here: pass the folder with {RUN_FILE}")
        records = snapshot.record_names()
        commits = self._read_records([(name, snapshot.modified[name]) for names in records.values() for name in names])
        streams = snapshot.streams()
        if DATASET_FILE not in snapshot.modified and not any(map(SHARD_NAME.fullmatch, streams)):
            folders = [self._stream_status(folder, records.get(folder, []), snapshot) for folder in streams]
            notes = share_faults({folder.shard: self._stream_identity(folder.shard) for folder in folders}).unfinished
            return fleet_status(self.store.url, folders, commits, snapshot.now, notes)
        self._dataset = self._dataset or read_dataset_shards(self.store)
        claims = claims_from_names(snapshot.modified)
        items = [(shard, claims.get(shard, ClaimState()), records.get(shard, [])) for shard in self._dataset]
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            shards = list(pool.map(lambda item: self._shard_status(item[0], item[1], item[2], snapshot), items))
        return fleet_status(self.store.url, shards, commits, snapshot.now)

    def _read_records(self, wanted: Sequence[tuple[str, float]]) -> list[Commit]:
        """Reads the records that are new; returns the commits of all of them, by time."""
        new = [key for key in wanted if key not in self._records]
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            self._records.update(zip(new, pool.map(lambda key: self._read_record(key[0]), new), strict=True))
        read = ((at, self._records[name, at]) for name, at in wanted)
        commits = [Commit(at, r.n_samples, r.n_seen) for at, r in read if isinstance(r, CommitRecord)]
        return sorted(commits, key=lambda commit: commit.at)

    def _read_record(self, name: str) -> CommitRecord | str:
        """The record, or a description of its damage."""
        try:
            return CommitRecord.from_bytes(self.store.read_bytes(name))
        except FileNotFoundError:
            return f"{name} is gone"
        except (ValueError, OSError) as error:
            return f"{name}: {error}"

    def _committed(self, names: Sequence[str], snapshot: _Snapshot) -> tuple[list[CommitRecord], str | None]:
        """The records after which a run would continue, as in `committed_records`, and the damage that ends them."""
        records: list[CommitRecord] = []
        for name in names:
            record = self._records[name, snapshot.modified[name]]
            if isinstance(record, str):
                return records, record
            files = (f"{_folder(name)}/{file.name}" for file in record.files)
            missing = next((file for file in files if file not in snapshot.modified), None)
            if missing is not None:
                return records, f"{missing} is missing"
            records.append(record)
        return records, None

    def _stream_identity(self, folder: str) -> StreamIdentity:
        if folder not in self._streams:
            self._streams[folder] = read_stream(self.store, folder).stream
        return self._streams[folder]

    def _stream_status(self, folder: str, names: list[str], snapshot: _Snapshot) -> ShardStatus:
        records, damage = self._committed(names, snapshot)
        counts = _counts(records)
        if _is_finished(records):
            return ShardStatus(folder, "finished", expected_samples=counts["samples"], **counts)
        silent_s = snapshot.age(names[-1]) if names else None
        return ShardStatus(folder, "unfinished", silent_s=silent_s, error=damage, **counts)

    def _shard_status(self, shard: str, state: ClaimState, names: list[str], snapshot: _Snapshot) -> ShardStatus:
        assert self._dataset is not None
        records, damage = self._committed(names, snapshot)
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
        return self._with_claim(found, state, snapshot)

    def _samples_per_record(self) -> int | None:
        """The same in all records of a dataset; None before there is a record with a sample."""
        records = (record for record in self._records.values() if isinstance(record, CommitRecord) and record.n_samples)
        return next((record.samples_per_record for record in records), None)

    def _with_claim(self, found: ShardStatus, state: ClaimState, snapshot: _Snapshot) -> ShardStatus:
        """Adds the state of the claims: the owner, whether it is alive, and why the shard is set aside."""
        error = self._poison_error(found.shard, state)
        found = replace(found, **self._owner(found))
        if error is not None:
            return replace(found, state="poisoned", error=error)
        if not state.is_held:
            return found
        beat = lease_file(found.shard, state.epoch, "beat")
        silent_s = snapshot.age(beat, lease_file(found.shard, state.epoch, "json"))
        is_alive = silent_s <= self._lease(found.shard, state.epoch).ttl_s
        return replace(
            found,
            state="running" if is_alive else "abandoned",
            silent_s=silent_s,
            computed_samples=self._beat(found.shard, state.epoch, snapshot.modified.get(beat)).get(
                "computed_samples", 0
            ),
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

    def _poison_error(self, shard: str, state: ClaimState) -> str | None:
        """The error for which the shard is set aside; None when it is not."""
        if not state.failures and not state.is_poisoned:
            self._poison.pop(shard, None)
        elif shard not in self._poison:
            error = poison_error(self.store, shard, state)
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
