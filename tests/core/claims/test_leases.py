"""Leases on shards: one holder at a time as far as anyone can know, and nobody waits for ever for a dead one."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_gcs import CommitThenReset, CommitThenStatus, FakeGcs, Status, gcs_environment

from core.base.canonical_json import read_sealed_json
from core.base.errors import RunError
from core.claims.leases import DatasetShardClaims, Lease, poll_interval_s
from core.claims.records import (
    ClaimState,
    Owner,
    clear_failures,
    damaged_claims,
    read_beat,
    read_claims,
    read_lease,
    read_release,
)
from core.object_store import Listing, LocalStore, ObjectStore, RetryPolicy, open_store

QUICK = RetryPolicy(base_s=0.002, cap_s=0.02, connect_timeout_s=5.0, read_timeout_s=5.0, write_timeout_s=5.0)
CLAIMANTS = 32


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcs]:
    with FakeGcs() as fake:
        for name, value in gcs_environment(fake).items():
            monkeypatch.setenv(name, value)
        yield fake


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return LocalStore(tmp_path)


def never(shard: str) -> bool:
    return False


def always(shard: str) -> bool:
    return True


def claims(
    store: ObjectStore, worker_id: int = 0, is_finished: Callable[[str], bool] = never, **options
) -> DatasetShardClaims:
    return DatasetShardClaims(store, Owner.of_this_process(worker_id), is_finished, **options)


def claimed(who: DatasetShardClaims, shard: str = "shard_000") -> Lease:
    lease = who.try_next([shard])
    assert lease is not None
    return lease


def race(store: ObjectStore, enter: Callable[[DatasetShardClaims], Lease | None]) -> list[Lease]:
    """What 32 claimants that start together get."""
    barrier = threading.Barrier(CLAIMANTS)

    def run(number: int) -> Lease | None:
        claimant = claims(store, number)
        barrier.wait()
        return enter(claimant)

    with ThreadPoolExecutor(CLAIMANTS) as pool:
        return [lease for lease in pool.map(run, range(CLAIMANTS)) if lease is not None]


def test_of_32_claimants_of_a_shard_one_wins_on_a_disk(tmp_path):
    for attempt in range(50):
        store = LocalStore(tmp_path / str(attempt))
        (winner,) = race(store, lambda claimant: claimant.try_next(["shard_000"]))
        stored = json.loads(store.read_bytes("claims/shard_000/000001.json"))
        assert stored["owner"]["nonce"] == winner.record.owner.nonce
        assert len(store.list()) == 1


def test_of_32_claimants_of_a_shard_one_wins_in_a_bucket(server):
    store = open_store("gs://bucket/out", QUICK)
    for attempt in range(5):
        shard = f"shard_{attempt:03d}"
        assert len(race(store, lambda claimant, shard=shard: claimant.try_next([shard]))) == 1
        assert len(server.generations(f"out/claims/{shard}/000001.json")) == 1


def test_of_32_observers_of_a_dead_holder_one_takes_over(store):
    claimed(claims(store))
    clock = Clock()

    def watch(claimant: DatasetShardClaims) -> Lease | None:
        claimant.clock = clock
        assert claimant.try_next(["shard_000"]) is None
        seen.wait()
        clock.now = 90.0
        return claimant.try_next(["shard_000"])

    seen = threading.Barrier(CLAIMANTS)
    (winner,) = race(store, watch)
    assert winner.epoch == 2


def test_only_the_observers_own_clock_lets_a_lease_expire(store, monkeypatch):
    first, clock = claims(store), Clock(1e6)
    lease = claimed(first)
    second = claims(store, clock=clock)
    for hours in (-1, 1, 0):
        monkeypatch.setattr(time, "time", lambda hours=hours: 1.7e9 + hours * 3600)
        assert second.try_next(["shard_000"]) is None
    clock.now += 89.9
    assert second.try_next(["shard_000"]) is None
    clock.now += 0.1
    taken = claimed(second)
    assert (taken.epoch, taken.record.replaces.nonce) == (2, first.owner.nonce)
    assert not lease.is_held()


def test_every_sign_of_life_starts_the_ttl_anew(store):
    lease, clock = claimed(claims(store)), Clock()
    observer = claims(store, clock=clock)
    for _ in range(5):
        lease.beat()
        assert observer.try_next(["shard_000"]) is None
        clock.now += 80
    assert observer.try_next(["shard_000"]) is None
    clock.now += 10
    assert claimed(observer).epoch == 2


def test_an_observer_that_slept_past_the_ttl_looks_again_before_it_takes_over(store):
    lease, clock = claimed(claims(store)), Clock()
    observer = claims(store, clock=clock)
    assert observer.try_next(["shard_000"]) is None
    lease.beat()
    clock.now += 1000
    assert observer.try_next(["shard_000"]) is None


def test_one_observer_finds_the_dead_one_of_100_leases_within_the_ttl_and_two_looks():
    store, clock = open_store("memory://one_of_100"), Clock()
    shards = [f"shard_{number:03d}" for number in range(100)]
    holder = claims(store, clock=clock)
    leases = [claimed(holder, shard) for shard in shards]
    dead = leases[37]
    observer = claims(store, 1, clock=clock)
    # It dies between two looks, after its last heartbeat.
    died_at = clock.now = 50.0
    for lease in leases:
        lease.beat()
    clock.now += 19.0
    looks = []
    while clock.now - died_at <= 90 + 2 * 20:
        looks.append(observer.try_next(shards))
        clock.now += 20.0
        for lease in leases:
            if lease is not dead:
                lease.beat()
    (taken,) = filter(None, looks)
    assert taken.dataset_shard == dead.dataset_shard


def fill(server: FakeGcs, n_leases: int) -> list[str]:
    """Held leases with a heartbeat each, put there without asking."""
    shards = [f"shard_{number:04d}" for number in range(n_leases)]
    for shard in shards:
        for kind in ("json", "beat"):
            server.state.insert("bucket", {"name": f"out/claims/{shard}/000001.{kind}"}, b"{}", {})
    return shards


def test_1000_observers_of_1000_leases_make_two_requests_each_a_heartbeat(server):
    shards, store = fill(server, 1000), open_store("gs://bucket/out", QUICK)
    clock = Clock()
    observers = [claims(store, number, clock=clock) for number in range(5)]
    for _ in range(6):
        before = len(server.requests)
        assert [observer.try_next(shards) for observer in observers] == [None] * len(observers)
        kinds = Counter(request.kind for request in server.requests[before:])
        # Nothing that one of them does depends on the others, so a thousand make 2,000.
        assert kinds == {"object.list": 2 * len(observers)}
        clock.now += 14.9
    assert poll_interval_s(20.0, 1000) == 20.0


def test_no_waiting_worker_makes_more_than_15_requests_a_heartbeat_however_many_shards_there_are():
    for n_shards in (1, 4_000, 5_000, 20_000, 1_000_000):
        requests = 3 * n_shards / 1000
        assert requests * 20.0 / poll_interval_s(20.0, n_shards) <= 15


def test_what_a_worker_saw_while_it_had_work_counts_for_the_ttl(store):
    clock = Clock()
    held = claimed(claims(store))
    busy = claims(store, 1, clock=clock)
    assert busy.try_next(["shard_000", "shard_001"]).dataset_shard == "shard_001"
    clock.now = 90.0
    taken = busy.try_next(["shard_000"])
    assert (taken.dataset_shard, taken.epoch) == (held.dataset_shard, 2)


def test_a_shard_that_is_claimed_anew_has_its_ttl_from_then_on_also_without_a_sign_of_life(store):
    clock, first = Clock(), claimed(claims(store))
    observer = claims(store, clock=clock)
    assert observer.try_next(["shard_000"]) is None
    clock.now = 80.0
    first.release("stopped")
    claimed(claims(store, 1))
    assert observer.try_next(["shard_000"]) is None
    clock.now = 169.0
    assert observer.try_next(["shard_000"]) is None
    clock.now = 170.0
    assert claimed(observer).epoch == 3


def test_a_sign_of_life_counts_from_the_end_of_one_listing_to_the_beginning_of_another(store, monkeypatch):
    clock, listing = Clock(), store.listing
    claimed(claims(store))
    observer = claims(store, clock=clock)

    def slow(prefix: str = "") -> Listing:
        clock.now += 25.0
        entries = listing(prefix)
        clock.now += 25.0
        return entries

    monkeypatch.setattr(store, "listing", slow)
    assert observer.try_next(["shard_000"]) is None
    # Seen from 50 to 100 only, though 150 seconds have gone by.
    clock.now = 100.0
    assert observer.try_next(["shard_000"]) is None
    clock.now = 140.0
    assert claimed(observer).epoch == 2


def test_who_waits_looks_less_often_where_there_are_many_shards(store, monkeypatch):
    monkeypatch.setattr("core.claims.leases.SHARDS_A_HEARTBEAT", 1)
    holder, stop, waited = claims(store), threading.Event(), []
    shards = [claimed(holder, f"shard_{number:03d}").dataset_shard for number in range(3)]
    monkeypatch.setattr(stop, "wait", lambda seconds: waited.append(seconds) or stop.set())
    assert claims(store, 1, heartbeat_s=20.0).next(shards, stop=stop) is None
    assert waited == [60.0]


def test_a_holder_that_comes_back_after_a_takeover_notices_and_changes_nothing(store):
    clock = Clock()
    observer = claims(store, clock=clock)
    with claimed(claims(store)) as zombie:
        assert observer.try_next(["shard_000"]) is None
        clock.now += 90
        successor = claimed(observer)
        before = store.list()
        zombie.beat()
        assert zombie.lost.is_set()
    assert store.list() == before
    assert successor.is_held()
    assert read_claims(store)["shard_000"].is_held


def test_the_heartbeat_notices_a_takeover_by_itself_and_stops(store):
    clock = Clock()
    with claimed(claims(store, heartbeat_s=0.02)) as lease:
        observer = claims(store, clock=clock, ttl_s=0)
        while observer.try_next(["shard_000"]) is None:
            continue
        assert lease.lost.wait(5)


def test_signs_of_life_are_counted_and_no_more_frequent_than_asked(store):
    started = time.monotonic()
    with claimed(claims(store, heartbeat_s=0.1)) as lease:
        lease.report = lambda: {"samples": 7}
        time.sleep(0.55)
        most = (time.monotonic() - started) / 0.1
    sign = json.loads(store.read_bytes("claims/shard_000/000001.beat"))
    assert 1 <= sign["beat"] <= most
    assert (sign["samples"], sign["owner"]) == (7, lease.record.owner.nonce)


@pytest.mark.parametrize("fault", [CommitThenStatus(503), CommitThenReset()])
def test_an_owner_whose_acknowledgement_is_lost_knows_its_own_claim(server, fault):
    store = open_store("gs://bucket/out", QUICK)
    server.faults.add("upload", fault)
    with claimed(claims(store)) as lease:
        assert server.faults.taken == 1
        server.faults.add("upload", fault)
        lease.release("done")
    assert server.faults.taken == 2
    assert [json.loads(blob)["reason"] for name, blob in server.objects().items() if "released" in name] == ["done"]
    assert claims(store, is_finished=always).next(["shard_000"]) is None


class LosesReplies(LocalStore):
    """Creates, forgets that it did, and creates again: what a client that repeats a request sees."""

    def create_bytes(self, name, data):
        super().create_bytes(name, data)
        return super().create_bytes(name, data)


def test_an_owner_whose_acknowledgement_is_lost_on_a_disk_knows_its_own_claim(tmp_path):
    assert claimed(claims(LosesReplies(tmp_path))).is_held()
    assert claims(LosesReplies(tmp_path)).try_next(["shard_000"]) is None


def test_a_heartbeat_that_fails_is_no_end(server):
    store = open_store("gs://bucket/out", QUICK)
    with claimed(claims(store, heartbeat_s=0.05)) as lease:
        server.faults.add("upload", Status(403), times=1)
        while server.faults.taken < 1 or "out/claims/shard_000/000001.beat" not in server.objects():
            time.sleep(0.01)
        assert not lease.lost.is_set()


def test_a_shard_given_back_is_free_at_once_and_a_done_one_only_while_its_output_is_incomplete(store):
    with claimed(claims(store)):
        pass
    with pytest.raises(RunError, match="told"), claimed(claims(store)) as second:
        raise RunError("told")
    with claimed(claims(store)) as third:
        third.release("done")
    assert (second.epoch, third.epoch) == (2, 3)
    reasons = [json.loads(store.read_bytes(f"claims/shard_000/00000{epoch}.released"))["reason"] for epoch in (1, 2, 3)]
    assert reasons == ["stopped", "failed", "done"]
    assert claims(store, is_finished=always).next(["shard_000"]) is None
    observer = claims(store)
    assert observer.remaining(["shard_000"]) == ["shard_000"]
    assert claimed(observer).epoch == 4


def test_the_output_of_a_shard_released_as_done_is_looked_at_once(store):
    with claimed(claims(store)) as lease:
        lease.release("done")
    looks = []
    observer = claims(store, is_finished=lambda shard: looks.append(shard) is None)
    assert [observer.remaining(["shard_000"]), observer.try_next(["shard_000"]), observer.remaining(["shard_000"])] == [
        [], None, [],
    ]  # fmt: skip
    assert looks == ["shard_000"]


def test_a_shard_whose_output_is_complete_is_not_claimed(store):
    assert claims(store, is_finished=always).next(["shard_000"]) is None
    assert store.list() == []


def test_whoever_finds_all_shards_held_waits_until_they_are_done(store):
    with claimed(claims(store)) as lease, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(claims(store, is_finished=always, heartbeat_s=0.02).next, ["shard_000"])
        time.sleep(0.2)
        assert not waiting.done()
        lease.release("done")
        assert waiting.result(5) is None


def test_whoever_waits_stops_when_told(store):
    stop = threading.Event()
    with claimed(claims(store)), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(claims(store).next, ["shard_000"], None, stop)
        time.sleep(0.1)
        stop.set()
        assert waiting.result(5) is None


SHARDS = [f"shard_{index:03d}" for index in range(40)]


def test_workers_with_different_ids_begin_at_different_shards(store):
    firsts = [
        claims(store, worker)._in_order(SHARDS, dict.fromkeys(SHARDS, ClaimState()), None)[0] for worker in range(40)
    ]
    assert [shard for shard, _ in firsts] == SHARDS


def test_workers_with_the_same_id_part_after_the_first_shard(store):
    seconds = {claims(store)._in_order(SHARDS, dict.fromkeys(SHARDS, ClaimState()), None)[1][0] for _ in range(40)}
    assert len(seconds) > 10


def test_whoever_starts_late_asks_nothing_of_what_is_done_before_it_works(server):
    store, asked = open_store("gs://bucket/run"), []
    shards = [f"shard_{number:03d}" for number in range(40)]
    for shard in shards[:-1]:
        claimed(claims(store), shard).release("done")
    late = claims(store, is_finished=lambda shard: asked.append(shard) or shard != shards[-1])
    before = len(server.requests)
    assert late.any_remaining(shards)
    assert late.try_next(shards).dataset_shard == shards[-1]
    assert asked == [shards[-1]]
    kinds = Counter(request.kind for request in server.requests[before:])
    assert kinds == {"object.list": 2, "object.get": 1, "upload.multipart": 1}
    assert claims(store, is_finished=lambda shard: True).remaining(shards) == shards[-1:]


def test_the_preferred_shard_comes_first_when_it_is_free(store):
    assert claims(store).try_next(SHARDS, "shard_033").dataset_shard == "shard_033"
    assert claims(store).try_next(SHARDS, "shard_033").dataset_shard == "shard_000"


def test_many_workers_hold_as_many_different_shards(store):
    with ThreadPoolExecutor(16) as pool:
        leases = list(pool.map(lambda worker: claims(store, worker % 3).next(SHARDS), range(40)))
    assert sorted(lease.dataset_shard for lease in leases) == SHARDS


def fail(who: DatasetShardClaims, error: str) -> None:
    with claimed(who) as lease:
        who.record_failure(lease, error)
        lease.release("failed")


def test_three_failures_with_the_same_error_set_a_shard_aside(store):
    for error in ("line 7 is broken", "other", "line 7 is broken"):
        fail(claims(store), error)
    fail(claims(store), "line 7 is broken")
    observer = claims(store)
    assert observer.next(["shard_000"]) is None
    assert observer.set_aside == {"shard_000": "line 7 is broken"}


def test_a_shard_that_fails_with_another_error_each_time_is_set_aside_too(store):
    for number in range(9):
        fail(claims(store), f"{number} bytes too few")
    assert claims(store).remaining(["shard_000"]) == ["shard_000"]
    fail(claims(store), "9 bytes too few")
    observer = claims(store)
    assert observer.next(["shard_000"]) is None
    assert observer.set_aside["shard_000"].startswith("10 different errors, such as: 0 bytes")


def test_the_verdict_is_written_once_by_whoever_sees_it_first_and_says_why(store):
    for error in ("line 7 is broken",) * 3:
        fail(claims(store), error)
    assert "claims/shard_000/poisoned.json" not in store.list()
    observers = [claims(store) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda observer: observer.next(["shard_000"]), observers)) == [None] * 4
    assert read_sealed_json(store.read_bytes("claims/shard_000/poisoned.json")) == {
        "error": "line 7 is broken", "failures": 3,
    }  # fmt: skip
    # The notes may go; the verdict stands by itself.
    for name in store.list("claims/shard_000/failures/"):
        store.delete(name)
    assert claims(store).next(["shard_000"]) is None


def test_a_shard_whose_failures_are_cleared_is_claimed_again_by_those_who_run(store):
    for _ in range(3):
        fail(claims(store), "line 7 is broken")
    observer = claims(store)
    assert observer.try_next(["shard_000", "shard_001"]).dataset_shard == "shard_001"
    assert observer.remaining(["shard_000", "shard_001"]) == ["shard_001"]
    assert observer.set_aside == {"shard_000": "line 7 is broken"}
    assert clear_failures(store, "shard_000") == 3
    assert observer.try_next(["shard_000", "shard_001"]).dataset_shard == "shard_000"
    assert observer.set_aside == {}
    assert not [name for name in store.list() if "poisoned" in name or "failures" in name]


def test_a_verdict_that_was_lost_on_the_way_is_passed_again_by_the_next(store):
    for _ in range(3):
        fail(claims(store), "line 7 is broken")
    store.delete("claims/shard_000/poisoned.json")
    assert claims(store).remaining(["shard_000"]) == []
    assert read_claims(store)["shard_000"].is_poisoned


def test_work_that_stands_still_falls_silent_and_speaks_again_when_it_goes_on(store):
    clock, done = Clock(), {"samples": 0}
    lease = claimed(claims(store, clock=clock, stall_s=100.0))
    lease.report = lambda: dict(done)
    beat = "claims/shard_000/000001.beat"

    def beats() -> int:
        return json.loads(store.read_bytes(beat))["beat"] if store.info(beat) else 0

    seen = []
    for samples, seconds in ((1, 99), (1, 1), (1, 500), (2, 0), (2, 99), (2, 1)):
        done["samples"] = samples
        clock.now += seconds
        lease.beat()
        seen.append(beats())
    assert seen == [1, 2, 2, 3, 4, 4]


def test_a_lease_says_who_holds_it_and_how_long_to_wait(store):
    first = claimed(claims(store, 7, ttl_s=50.0, heartbeat_s=5.0))
    assert read_lease(store, "shard_000", 1) == first.record
    assert (first.record.ttl_s, first.record.heartbeat_s, first.record.replaces) == (50.0, 5.0, None)
    first.abandon()
    assert read_release(store, "shard_000", 1) == "stopped"
    second = claimed(claims(store, 8))
    assert read_lease(store, "shard_000", 2).replaces == first.record.owner
    assert second.record.owner.worker_id == 8


def test_a_lease_is_given_back_once_whoever_does_it(store):
    with claimed(claims(store)) as lease:
        lease.abandon()
        lease.release("done")
    assert read_release(store, "shard_000", 1) == "stopped"
    assert not lease._thread.is_alive()


WRONG = [b"", b"[]", b"{", b"null", b'{"owner": 3}', b"[" * 100_000, b"\xff"]


@pytest.mark.parametrize("name", ["000001.json", "000001.released", "poisoned.json", "failures/000.json"])
@pytest.mark.parametrize("data", WRONG)
def test_no_claim_can_make_a_trace(name, data, store):
    for _ in range(3):
        fail(claims(store), "line 7 is broken")
    for epoch in (2, 3):
        for kind in ("json", "released"):
            store.delete(f"claims/shard_000/{epoch:06d}.{kind}")
    if name != "poisoned.json":
        store.delete("claims/shard_000/poisoned.json")
    store.replace_bytes(f"claims/shard_000/{name}", data)
    error = ""
    try:
        claims(store).remaining(["shard_000"])
        claims(store).try_next(["shard_000"])
    except RunError as raised:
        error = str(raised)
    assert not error or name in error
    assert not error or "remove the folder claims" in error
    assert damaged_claims(store, store.list()) == [f"claims/shard_000/{name}"]


def test_a_sign_of_life_that_cannot_be_read_is_one_all_the_same(store):
    clock = Clock()
    claimed(claims(store))
    observer = claims(store, clock=clock)
    for beat in WRONG:
        store.replace_bytes("claims/shard_000/000001.beat", beat)
        assert read_beat(store, "shard_000", 1).keys() <= {"owner"}
        assert observer.try_next(["shard_000"]) is None
        clock.now += 80


def test_being_killed_again_and_again_does_not_count(store):
    clock = Clock()
    for epoch in range(1, 8):
        claimant = claims(store, clock=clock)
        claimant.try_next(["shard_000"])
        clock.now += 90
        if epoch > 1:
            assert claimed(claimant).epoch == epoch
    assert claims(store).remaining(["shard_000"]) == ["shard_000"]


def test_failed_shards_come_after_those_that_never_failed(store):
    fail(claims(store), "broken")
    assert claims(store).try_next(["shard_000", "shard_001"]).dataset_shard == "shard_001"


def test_a_damaged_claim_is_one_line_that_says_what_to_do(store):
    claimed(claims(store))
    store.replace_bytes("claims/shard_000/000001.json", b"{")
    clock = Clock()
    observer = claims(store, clock=clock)
    observer.try_next(["shard_000"])
    clock.now = 90
    with pytest.raises(RunError, match=r"claims/shard_000/000001\.json: the claim is gone or damaged"):
        observer.try_next(["shard_000"])
