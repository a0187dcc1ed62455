"""Claims and commits under all faults of workers, compared step by step with a model of plain dicts.

Three workers share two dataset shards of three windows. All workers write the same files for a window, up to the
rounding of their hardware, so the model is small: the holder of the last lease of each dataset
shard, the heartbeats that each worker has seen and when, and the committed windows.
"""

import hashlib
import tempfile
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from dict_store import DictStore
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.activation_storage import ActivationStorage
from core.base.canonical_json import read_sealed_json
from core.base.errors import RunError
from core.claims.leases import DatasetShardClaims, Lease
from core.claims.records import POISON_AFTER, Owner, clear_failures, read_claims
from core.commit.identity import RunIdentity, StreamIdentity
from core.commit.record import RECORD_NAME, CommitRecord, StoredFile, StoredSite
from core.commit.stored_records import METADATA_FILE, committed_records, folder_metadata
from core.object_store import LocalStore
from core.object_store.sinks import DigestWriter
from core.run.sharded_run import is_dataset_shard_finished
from core.samples.windows import StreamPlace
from core.shards.encoding import SpooledFile
from core.shards.names import shard_stem

SHARDS = ("shard_000", "shard_001")
WINDOWS, WORKERS, TTL_S = 3, 3, 90.0
PLAN = RunIdentity(
    model={}, tokenizer=None, prompts={}, sites=("residual",), layers=(0,), dtype="float16", compute_dtype="float32",
    format="pickle", compress=False, shard_bytes=1, max_seq_length=8, overlong="truncate",
)  # fmt: skip


def content(shard: str, window: int, hardware: int) -> bytes:
    return hashlib.sha256(f"{shard} {window}".encode()).digest() + bytes([hardware]) * (1 + hardware)


def is_content(data: bytes, shard: str, window: int) -> bool:
    """Whether it is what some hardware makes of the window."""
    return data in (content(shard, window, 0), content(shard, window, 1))


def file_name(window: int) -> str:
    return f"shard_{window:04d}.pkl"


def first_sample(shard: str, window: int) -> int:
    return (SHARDS.index(shard) * WINDOWS + window - 1) * 2


def one_after_another(max_workers: int):
    """In place of a pool of threads: there is nothing to wait for in a dict, and starting threads takes longer."""
    return nullcontext(SimpleNamespace(map=map))


Mark = tuple[int, bytes | None]
"""What an observer can see of a lease: its number and its last heartbeat."""


@dataclass
class Worker:
    """One start of one process, and what it has in its hands."""

    claims: DatasetShardClaims
    hardware: int
    lease: Lease | None = None
    storage: ActivationStorage | None = None
    window: int = 0
    stored: StoredFile | None = None
    saw: dict[str, tuple[Mark, float]] = field(default_factory=dict)
    saw_finished: set[str] = field(default_factory=set)
    """Shards that it need not look at again, even if a disk forgets them: its next start does."""


@dataclass
class Held:
    """The last lease of a shard in the model."""

    epoch: int
    worker: Worker
    released: bool = False


class Protocol(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.open = ExitStack()
        for module in ("commit.stored_records", "claims.leases"):
            self.open.enter_context(mock.patch(f"core.{module}.ThreadPoolExecutor", one_after_another))
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.open.enter_context(self.folder)
        self.spool = LocalStore(self.folder.name)
        self.store = DictStore()
        self.now = 0.0
        self.workers: list[Worker] = []
        self.held: dict[str, Held] = {}
        self.garbage: set[str] = set()
        self.failures = dict.fromkeys(SHARDS, 0)
        self.has_lost = False

    @initialize()
    def start(self) -> None:
        self.workers = [self.new_worker(number) for number in range(WORKERS)]

    def new_worker(self, number: int) -> Worker:
        # Two of them have the same configured id.
        owner = Owner(number // 2, "host", number, f"{number}-{id(object())}-{self.now}-{len(self.store.objects)}")
        claims = DatasetShardClaims(
            self.store,
            owner,
            lambda shard: is_dataset_shard_finished(self.store, shard),
            ttl_s=TTL_S,
            clock=lambda: self.now,
        )
        return Worker(claims, hardware=number % 2)

    # What workers do.

    @rule(number=st.integers(0, WORKERS - 1))
    def claim(self, number: int) -> None:
        worker = self.workers[number]
        if worker.lease is not None:
            return
        before = {shard: self.mark(shard) for shard in SHARDS}
        worker.saw_finished |= {shard for shard in SHARDS if is_dataset_shard_finished(self.store, shard)}
        free = [shard for shard in SHARDS if shard not in worker.saw_finished and self.is_free(shard)]
        lease = worker.claims.try_next(SHARDS)
        if lease is None:
            assert not free, f"{free} could have been claimed"
            self.look(worker, before)
            return
        self.claimed(worker, lease, free, before)

    def claimed(self, worker: Worker, lease: Lease, free: list[str], before: dict[str, Mark]) -> None:
        shard, held = lease.dataset_shard, self.held.get(lease.dataset_shard)
        assert not is_dataset_shard_finished(self.store, shard), "a finished shard was claimed"
        assert self.failures[shard] < POISON_AFTER, "a poisoned shard was claimed"
        if held is not None and not held.released:
            mark, since = worker.saw.get(shard, (None, self.now))
            assert mark == before[shard], "a lease was stolen that had just been seen alive"
            assert self.now - since >= TTL_S, "a lease was stolen early"
            assert shard not in free
            assert not free, "a lease was stolen while a shard was free"
        self.look(worker, before, but=shard)
        assert lease.epoch == (held.epoch if held else 0) + 1
        self.held[shard] = Held(lease.epoch, worker)
        worker.lease, worker.stored = lease, None
        worker.storage = self.storage_of(shard)
        worker.window = len(worker.storage.open()) + 1

    def storage_of(self, shard: str) -> ActivationStorage:
        stream = StreamIdentity({"name": shard}, 0, 1, None, SHARDS.index(shard))
        return ActivationStorage(PLAN, stream, shard, primary=self.store, spool=self.spool)

    def mark(self, shard: str) -> Mark:
        epoch = self.held[shard].epoch if shard in self.held else 0
        return epoch, self.store.objects.get(f"claims/{shard}/{epoch:06d}.beat")

    def is_free(self, shard: str) -> bool:
        """Whether no worker holds a dataset shard, and it is not set aside."""
        held = self.held.get(shard)
        return self.failures[shard] < POISON_AFTER and (held is None or held.released)

    def look(self, worker: Worker, marks: dict[str, Mark], but: str | None = None) -> None:
        """What the worker has seen of the leases of others, and since when it has been like that."""
        for shard, mark in marks.items():
            held = self.held.get(shard)
            if held is None or held.released or shard == but or self.failures[shard] >= POISON_AFTER:
                continue
            if worker.saw.get(shard, (None, 0.0))[0] != mark:
                worker.saw[shard] = mark, self.now

    @rule(number=st.integers(0, WORKERS - 1))
    def renew(self, number: int) -> None:
        worker = self.workers[number]
        if worker.lease is None:
            return
        before = dict(self.store.objects)
        worker.lease.beat()
        is_last = self.held[worker.lease.dataset_shard].worker is worker
        assert worker.lease.lost.is_set() != is_last
        if not is_last:
            assert self.store.objects == before, "a zombie wrote a heartbeat"

    @rule(number=st.integers(0, WORKERS - 1))
    def upload(self, number: int) -> None:
        worker = self.workers[number]
        if worker.lease is None or worker.stored is not None or worker.window > WINDOWS:
            return
        assert worker.storage is not None
        shard, name = worker.lease.dataset_shard, file_name(worker.window)
        window = worker.window
        data = content(shard, window, worker.hardware)
        path = self.spool.temporary_path(f"{shard}/{name}")
        path.write_bytes(data)
        writer = DigestWriter()
        writer.write(data)
        file = SpooledFile(
            name, "residual", path, writer.digest(), lambda stream: is_content(stream.read(), shard, window)
        )
        error = ""
        try:
            worker.stored = worker.storage.store(worker.window, file)
        except RunError as raised:
            error = str(raised)
        if error:
            assert f"{shard}/{name}" in self.garbage or "was lost" in error
            assert f"{shard}/{name}" in error
            self.give_back(worker, "failed")

    @rule(number=st.integers(0, WORKERS - 1))
    def commit(self, number: int) -> None:
        worker = self.workers[number]
        if worker.lease is None or worker.storage is None:
            return
        if worker.stored is not None:
            worker.storage.commit(self.record(worker.lease.dataset_shard, worker.window, worker.storage, worker.stored))
            worker.window, worker.stored = worker.window + 1, None
        if worker.window > WINDOWS and worker.lease.is_held():
            worker.storage.write_metadata()
            self.give_back(worker, "done")

    def record(self, shard: str, window: int, storage: ActivationStorage, stored: StoredFile) -> CommitRecord:
        first = first_sample(shard, window)
        return CommitRecord(
            window=window, plan_hash=storage.plan_hash, stream_hash=storage.stream_hash, first_sample_idx=first,
            last_sample_idx=first + 1, next_place=None if window == WINDOWS else StreamPlace(first + 2, first + 2),
            n_samples=2, n_tokens=2, n_truncated=0, n_dropped={}, n_empty=0, samples_per_record=1,
            sites={"residual": StoredSite((0,), 8)}, dtype="float16", files=(stored,),
        )  # fmt: skip

    def give_back(self, worker: Worker, reason) -> None:
        assert worker.lease is not None
        if worker.lease.is_held():
            worker.lease.release(reason)
            self.held[worker.lease.dataset_shard].released = True
        worker.lease = worker.storage = worker.stored = None

    @rule(number=st.integers(0, WORKERS - 1))
    def stop(self, number: int) -> None:
        if self.workers[number].lease is not None:
            self.give_back(self.workers[number], "stopped")

    @rule(number=st.integers(0, WORKERS - 1))
    def fail(self, number: int) -> None:
        """The shard's data meets an error, the same each time."""
        worker = self.workers[number]
        if worker.lease is not None and worker.lease.is_held():
            self.failures[worker.lease.dataset_shard] += 1
            worker.claims.record_failure(worker.lease, "line 7 is broken")
            self.give_back(worker, "failed")

    # What happens to them.

    @rule(seconds=st.sampled_from([1.0, 30.0, TTL_S - 1, TTL_S, 1000.0]))
    def pause(self, seconds: float) -> None:
        """Time passes in which no worker does anything."""
        self.now += seconds

    @rule(number=st.integers(0, WORKERS - 1))
    def crash(self, number: int) -> None:
        self.workers[number] = self.new_worker(number)

    @rule(number=st.integers(0, WORKERS - 1))
    def steal(self, number: int) -> None:
        """A worker looks, waits for the TTL, and looks again."""
        self.claim(number)
        self.pause(TTL_S)
        self.claim(number)

    @rule(victim=st.integers(0, WORKERS - 1), successor=st.integers(0, WORKERS - 1))
    def race_at_the_end(self, victim: int, successor: int) -> None:
        """A zombie and its successor write the same window one right after the other."""
        self.upload(victim)
        self.steal(successor)
        for number in (successor, victim):
            self.upload(number)
            self.commit(number)

    @rule()
    def lose_a_reply(self) -> None:
        self.store.loses_reply = True

    @rule(place=st.integers(0, 100))
    def lose_an_object(self, place: int) -> None:
        """A disk forgets a file, a record or folder metadata, except for a file that is about to be named."""
        in_hand = {f"{shard}/{file_name(window)}" for shard, window in self.in_hand()}
        names = [name for name in self.store.list("shard_") if not name.endswith("stream.json") and name not in in_hand]
        if names:
            self.store.delete(names[place % len(names)])
            self.has_lost = True
            self.garbage.discard(names[place % len(names)])

    @rule(shard=st.sampled_from(SHARDS), window=st.integers(1, WINDOWS))
    def leave_garbage(self, shard: str, window: int) -> None:
        """A file that no record names holds something else."""
        name = f"{shard}/{file_name(window)}"
        if name.replace(".pkl", ".json") not in self.store.objects and (shard, window) not in self.in_hand():
            self.store.objects[name] = b"garbage"
            self.garbage.add(name)

    def in_hand(self) -> set[tuple[str, int]]:
        """The windows whose file somebody has stored and is about to name: no disk damages it just then, here."""
        return {
            (worker.lease.dataset_shard, worker.window)
            for worker in self.workers
            if worker.stored is not None and worker.lease is not None
        }

    @precondition(lambda self: self.garbage)
    @rule()
    def remove_garbage(self) -> None:
        """A person does what the error says."""
        self.store.delete(self.garbage.pop())

    @precondition(lambda self: self.has_lost)
    @rule()
    def remove_records_without_files(self) -> None:
        """A person does what the error says."""
        for record in [name for name in self.store.list("shard_") if RECORD_NAME.fullmatch(name.rpartition("/")[2])]:
            if record.replace(".json", ".pkl") not in self.store.objects:
                self.store.delete(record)

    @precondition(lambda self: any(self.failures.values()))
    @rule()
    def try_again(self) -> None:
        """A person fixes the data while no worker holds it."""
        for shard in SHARDS:
            clear_failures(self.store, shard)
            self.failures[shard] = 0

    # What must hold, always.

    @invariant()
    def what_is_committed_is_right(self) -> None:
        for shard in SHARDS:
            for record in committed_records(self.store, shard):
                first = first_sample(shard, record.window)
                assert (record.first_sample_idx, record.last_sample_idx, record.n_samples) == (first, first + 1, 2)
                assert (record.next_place is None) == (record.window == WINDOWS)
                (file,) = record.files
                data = self.store.objects[f"{shard}/{file.name}"]
                assert is_content(data, shard, record.window)
                assert hashlib.sha256(data).hexdigest() == file.sha256

    @invariant()
    def nothing_that_is_created_is_replaced(self) -> None:
        assert all(name.endswith((".beat", "/metadata.json")) for name in self.store.replaced)

    @precondition(lambda self: not self.has_lost)
    @invariant()
    def folder_metadata_follows_from_the_records(self) -> None:
        """Not after a lost window was made again: the metadata may be of the first one, and the shard is not done."""
        for shard in SHARDS:
            data = self.store.objects.get(f"{shard}/{METADATA_FILE}")
            names = [f"{shard}/{shard_stem(window)}.json" for window in range(1, WINDOWS + 1)]
            if data is not None and all(name in self.store.objects for name in names):
                records = [CommitRecord.from_bytes(self.store.objects[name]) for name in names]
                metadata = read_sealed_json(data)
                of_those = records[: metadata["total_shards"]]
                assert metadata == folder_metadata(of_those), "metadata lists a window that was not committed"

    @invariant()
    def at_most_one_worker_holds_a_shard(self) -> None:
        for shard in SHARDS:
            believers = [
                w for w in self.workers if w.lease is not None and w.lease.dataset_shard == shard and w.lease.is_held()
            ]
            assert len(believers) <= 1
            epochs = sorted(
                int(name[-11:-5]) for name in self.store.list(f"claims/{shard}/0") if name.endswith(".json")
            )
            assert epochs == list(range(1, len(epochs) + 1))

    @invariant()
    def the_claims_say_what_the_model_says(self) -> None:
        states = read_claims(self.store)
        for shard, held in self.held.items():
            assert (states[shard].epoch, states[shard].is_released) == (held.epoch, held.released)
            assert len(states[shard].failures) == self.failures[shard]

    def teardown(self) -> None:
        """Whatever happened: once what is broken is mended, one more worker finishes everything."""
        with self.open:
            if self.workers:
                self.finish()

    def finish(self) -> None:
        """Mends what a person can mend, and lets one worker go on."""
        for name in self.garbage:
            self.store.delete(name)
        self.garbage.clear()
        self.remove_records_without_files()
        self.try_again()
        self.workers = [self.new_worker(number) for number in range(WORKERS)]
        for _ in range(4 * len(SHARDS) * (WINDOWS + 1)):
            if all(is_dataset_shard_finished(self.store, shard) and self.is_free(shard) for shard in SHARDS):
                break
            self.steal(0)
            self.upload(0)
            self.commit(0)
        for shard in SHARDS:
            assert is_dataset_shard_finished(self.store, shard), f"{shard} is never finished"
            assert [record.window for record in committed_records(self.store, shard)] == [1, 2, 3]
        assert self.workers[0].claims.next(SHARDS) is None
