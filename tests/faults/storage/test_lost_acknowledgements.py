"""Whoever writes and loses the acknowledgement recognises its own object, at every place where something is created."""

import re
from collections.abc import Mapping

import pytest
from fake_gcs import Action, Call, CommitThenReset, CommitThenStatus, FakeGcs, gcs_environment
from fleets import (
    LARGE,
    LARGE_LINES,
    LARGE_WIDTH,
    N_LINES,
    check_finished,
    flags,
    leave_alone,
    make_dataset,
    outputs,
    start_fleet,
)
from nursery import Worker
from tally import LOST
from tiny_run import token_lines, write_jsonl

from core.streams.sharded_dataset import read_dataset, write_dataset
from core.streams.writing import StreamOptions, create_streams

LOSSES = {"an error instead": CommitThenStatus(503), "no reply": CommitThenReset()}
# Nobody may have to wait for a lease to expire: whoever does not know its own claim again would.
PATIENT = {"claim_ttl_s": 90.0, "claim_heartbeat_s": 0.2}
# Every place that creates something in a run. `beat` and `metadata.json` are replaced, not created.
SITES = {
    "the plan": r"run\.json",
    "the dataset": r"dataset\.json",
    "the stream": r"shard_\d+/stream\.json",
    "activations": r"shard_\d+/shard_\d+\.pkl(\.gz)?",
    "the sample table": r"shard_\d+/samples_\d+\.jsonl\.gz",
    "the record": r"shard_\d+/shard_\d+\.json",
    "the lease": r"claims/shard_\d+/\d+\.json",
    "its release": r"claims/shard_\d+/\d+\.released",
}
OF_FAILURES = {"a failure": r"claims/shard_\d+/failures/\d+\.json", "the verdict": r"claims/shard_\d+/poisoned\.json"}
UPLOAD_CHUNK = 256 << 10
REPLACED = re.compile(r".*(\.beat|/metadata\.json)")


def lose_first(bucket: FakeGcs, action: Action, sizes: Mapping[str, int] | None = None) -> set[str]:
    """Loses the acknowledgement of the first commit of every object; returns the names as they are hit.

    sizes: of objects that are uploaded in chunks, of which the last commits.
    """
    hit: set[str] = set()

    def is_first_commit(call: Call) -> bool:
        commits = call.kind == "upload.multipart"
        if call.kind == "upload.chunk":
            received = len(bucket.state.uploads[call.query["upload_id"]].data)
            commits = received + UPLOAD_CHUNK >= (sizes or {})[call.object]
        if not commits or call.object in hit:
            return False
        hit.add(call.object)
        return True

    bucket.faults.add(is_first_commit, action, times=None)
    return hit


def check_stored(bucket: FakeGcs, hit: set[str], sites: dict[str, str]) -> None:
    """Every site was hit, everything that was created was created once, and no lease was taken twice."""
    names = [name.removeprefix("out/") for name in bucket.objects()]
    for site, pattern in sites.items():
        of_site = [name for name in names if re.fullmatch(pattern, name)]
        assert of_site, site
        assert [name for name in of_site if f"out/{name}" not in hit] == [], site
    created = [name for name in names if not REPLACED.fullmatch(name)]
    assert [name for name in created if len(bucket.generations(f"out/{name}")) != 1] == []
    assert not any("000002.json" in name for name in names)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_in_a_bucket_knows_all_its_own_objects(loss, nursery, calm, bucket, tally):
    data, files = calm
    hit = lose_first(bucket, LOSSES[loss])
    environment = {"environment": gcs_environment(bucket)}
    fleet = [nursery.start(Worker(flags(data, "gs://bucket/out", n, **PATIENT), **environment)) for n in range(2)]
    finished = [shard for worker in fleet for shard in worker.finish()["finished_shards"]]
    assert sorted(finished) == [f"shard_00{n}" for n in range(6)]
    check_stored(bucket, hit, SITES)
    stored = {name.removeprefix("out/"): blob for name, blob in bucket.objects().items()}
    assert outputs(stored) == files
    tally(LOST, len(hit))


@pytest.mark.parametrize("loss", LOSSES)
def test_uploads_in_chunks_know_their_own_objects(loss, nursery, calm_large, bucket, tally):
    data, files = calm_large
    hit = lose_first(bucket, LOSSES[loss], {f"out/{name}": len(data) for name, data in files.items()})
    wanted = flags(data, "gs://bucket/out", **LARGE, **PATIENT)
    options = {"environment": gcs_environment(bucket), "upload_chunk": UPLOAD_CHUNK, "width": LARGE_WIDTH}
    assert nursery.start(Worker(wanted, **options)).finish()["samples"] == LARGE_LINES
    check_stored(bucket, hit, SITES)
    stored = {name.removeprefix("out/"): blob for name, blob in bucket.objects().items()}
    assert outputs(stored) == files
    assert bucket.count("upload.chunk") > bucket.count("upload.start") > 10
    tally(LOST, len(hit))


@pytest.mark.parametrize("loss", LOSSES)
def test_failures_and_verdicts_are_noted_once(loss, nursery, place, bucket, tally):
    lines = token_lines(N_LINES, longest=30)
    lines[25] = {"input_ids": [1_000_000]}
    data = make_dataset(place, lines=lines)
    hit = lose_first(bucket, LOSSES[loss])
    worker = nursery.start(Worker(flags(data, "gs://bucket/out", **PATIENT), environment=gcs_environment(bucket)))
    assert worker.wait() == 1
    failures = [name for name in bucket.objects() if "/failures/" in name]
    assert len(failures) == 3
    for site, pattern in OF_FAILURES.items():
        assert any(re.fullmatch("out/" + pattern, name) for name in hit), site
    assert all(len(bucket.generations(name)) == 1 for name in bucket.objects() if not REPLACED.fullmatch(name))
    tally(LOST, len(hit))


@pytest.mark.parametrize("loss", LOSSES)
def test_making_a_dataset_and_streams_knows_its_own_objects(loss, place, bucket, monkeypatch, tally):
    from core.object_store import RetryPolicy

    quick = RetryPolicy(base_s=0.002, cap_s=0.02)
    monkeypatch.setattr("core.object_store.RetryPolicy", lambda: quick)
    source = write_jsonl(place / "s.jsonl", token_lines(20, longest=30))
    hit = lose_first(bucket, LOSSES[loss])
    write_dataset(source, 20, "gs://bucket/data", num_shards=3, chunk_size_mb=0.001)
    create_streams(StreamOptions(dataset_name=str(source), output_dir="gs://bucket/streams", num_streams=2))
    assert hit == set(bucket.objects())
    assert all(len(bucket.generations(name)) == 1 for name in bucket.objects())
    assert read_dataset("gs://bucket/data").total_tasks == 20
    tally(LOST, len(hit))


@pytest.mark.parametrize("loss", ["link_replies_are_lost", "every_create_is_repeated"])
def test_a_run_on_a_disk_knows_all_its_own_files(loss, nursery, calm, place, tally):
    data, files = calm
    out = place / "out"
    fleet = start_fleet(nursery, data, out, 2, change=loss)
    for worker in fleet:
        worker.finish()
    check_finished(out, files)
    names = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    for site, pattern in SITES.items():
        assert any(re.fullmatch(pattern, name) for name in names), site
    assert leave_alone(out) == files
    tally(LOST, len(names))
