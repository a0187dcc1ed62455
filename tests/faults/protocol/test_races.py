"""32 claimants of one shard: exactly one has it, on every kind of storage; the claim layer alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fleets import is_full
from tally import RACES

from core.base.canonical_json import read_sealed_json
from core.claims.leases import DatasetShardClaims, Lease
from core.claims.records import Owner
from core.object_store import ObjectStore, RetryPolicy, open_store

CLAIMANTS = 32
SHARD = "shard_000"
LEASE = f"claims/{SHARD}/000001.json"
# Races in the quick selection; all of them in the full one.
QUICK = {"disk": 40, "memory": 40, "bucket": 4}
FULL = 1000


@pytest.fixture(params=QUICK)
def backend(request, place, bucket) -> tuple[str, ObjectStore]:
    urls = {"disk": str(place), "memory": f"memory://{place.name}", "bucket": "gs://bucket/out"}
    patient = RetryPolicy(base_s=0.002, cap_s=0.02)
    return request.param, open_store(urls[request.param], patient)


def race(store: ObjectStore, pool: ThreadPoolExecutor) -> list[Lease]:
    barrier = threading.Barrier(CLAIMANTS)

    def claim(number: int) -> Lease | None:
        claimant = DatasetShardClaims(store, Owner.of_this_process(number % 3), lambda shard: False)
        barrier.wait()
        return claimant.try_next([SHARD])

    return [lease for lease in pool.map(claim, range(CLAIMANTS)) if lease is not None]


def test_of_32_claimants_exactly_one_wins(backend, tally):
    name, store = backend
    races = FULL if is_full() else QUICK[name]
    with ThreadPoolExecutor(CLAIMANTS) as pool:
        for _ in range(races):
            (winner,) = race(store, pool)
            assert read_sealed_json(store.read_bytes(LEASE))["owner"]["nonce"] == winner.record.owner.nonce
            assert store.list() == [LEASE]
            store.delete(LEASE)
    tally(RACES.format(name), races)
