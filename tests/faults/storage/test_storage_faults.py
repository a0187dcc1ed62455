"""A third of all storage calls fail, the last chunk of uploads breaks: runs finish, and nothing partial is seen."""

import pytest
from fake_gcs import Call, FakeGcs, PersistPart, Reset, Status, gcs_environment
from fleets import LARGE, LARGE_WIDTH, counts, flags, outputs
from nursery import Worker
from tally import STORAGE

from analysis.verification.verify import verify
from core.commit.record import CommitRecord
from core.object_store import RetryPolicy

UPLOAD_CHUNK = 256 << 10
# Every other try must get through; a heartbeat that is late costs no lease here.
PATIENT = {"claim_ttl_s": 90.0, "claim_heartbeat_s": 0.5}


def check_nothing_partial(bucket: FakeGcs) -> None:
    """Whatever a record names is there, whole."""
    objects = bucket.objects()
    for name, data in objects.items():
        folder, _, last = name.rpartition("/")
        if last.startswith("shard_") and last.endswith(".json") and "/claims/" not in name:
            for file in CommitRecord.from_bytes(data).files:
                assert len(objects[f"{folder}/{file.name}"]) == file.bytes


def is_last_chunk(bucket: FakeGcs, sizes: dict[str, int], call: Call) -> bool:
    if call.kind != "upload.chunk":
        return False
    return len(bucket.state.uploads[call.query["upload_id"]].data) + UPLOAD_CHUNK >= sizes[call.object]


@pytest.mark.parametrize("seed", counts(2, 20))
def test_a_run_finishes_when_a_third_of_all_calls_fail(seed, nursery, calm_large, bucket, tally):
    data, files = calm_large
    sizes = {f"out/{name}": len(content) for name, content in files.items()}

    broken: set[str] = set()

    def breaks(call: Call) -> bool:
        is_due = is_last_chunk(bucket, sizes, call) and call.object not in broken
        broken.update([call.object] if is_due else [])
        return is_due

    bucket.faults.add(breaks, (PersistPart(1000), PersistPart(0, 503), Reset())[seed % 3], times=None)
    for number, action in enumerate((Status(429), Status(503), Reset())):
        # Of what the ones before let through: a tenth of all calls each.
        bucket.faults.add(lambda call: True, action, None, 0.1 / (1 - 0.1 * number), seed + number)
    options = {"environment": gcs_environment(bucket), "upload_chunk": UPLOAD_CHUNK, "width": LARGE_WIDTH}
    wanted = [flags(data, "gs://bucket/out", number, **LARGE, **PATIENT) for number in range(2)]
    fleet = [nursery.start(Worker(flags_, **options)) for flags_ in wanted]
    while any(worker.returncode is None for worker in fleet):
        check_nothing_partial(bucket)
    for worker in fleet:
        worker.finish()
    failed, taken = bucket.faults.taken, len(bucket.requests)
    assert failed > 0.2 * taken
    # Bounded: no request is repeated more often than the policy says, and on average once or twice.
    assert taken < 2.5 * (taken - failed)
    bucket.faults.clear()
    stored = {name.removeprefix("out/"): blob for name, blob in bucket.objects().items()}
    assert outputs(stored) == files
    report = verify("gs://bucket/out")
    assert report.ok, report.lines()
    tally(STORAGE)


def test_a_storage_that_stays_away_ends_the_run_after_bounded_tries_and_a_later_run_heals(nursery, calm, bucket):
    data, files = calm
    bucket.faults.add(lambda call: call.kind.startswith("upload") and "shard_0002" in call.object, Status(503), None)
    worker = Worker(flags(data, "gs://bucket/out", **PATIENT), environment=gcs_environment(bucket))
    failed = nursery.start(worker)
    assert failed.wait() == 1
    assert [line for line in failed.errors.splitlines() if line.startswith("error: ")] == [
        failed.errors.splitlines()[-1]
    ]
    assert bucket.faults.taken <= 4 * RetryPolicy().tries
    check_nothing_partial(bucket)
    bucket.faults.clear()
    nursery.start(worker).finish()
    stored = {name.removeprefix("out/"): blob for name, blob in bucket.objects().items()}
    assert outputs(stored) == files
    assert not any("/failures/" in name for name in stored)
