"""How far a fleet is, by what its output says alone."""

import json
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fake_gcs import FakeGcs, gcs_environment
from tiny_run import cache_dir, run, token_lines, write_jsonl, write_model

from analysis.fleet_status.report import Commit, ShardStatus, fleet_status, rate_of
from analysis.fleet_status.status import FleetMonitor, retry, status, watch
from core.base.errors import RunError, UsageError
from core.claims.leases import ShardClaims
from core.claims.records import Owner, poison_error, read_claims
from core.commit.record import CommitRecord
from core.object_store import LocalStore, open_store
from core.run.config import RunConfig
from core.run.runner import run as extract
from core.samples.windows import StreamPlace
from core.streams.sharded_dataset import read_dataset, write_dataset

N_LINES, N_SHARDS = 40, 4


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """A finished run over a sharded dataset."""
    folder = tmp_path_factory.mktemp("fleet")
    write_model(folder / "model", tokenizer=False)
    source = write_jsonl(folder / "source.jsonl", token_lines(N_LINES, longest=60))
    write_dataset(source, N_LINES, str(folder / "data"), num_shards=N_SHARDS, chunk_size_mb=1.0)
    extract(config(folder))
    return folder / "out"


def config(folder: Path, **changes) -> RunConfig:
    flags = {
        "model_path": str(folder / "model"),
        "use_sharded_dataset": True,
        "sharded_dataset_dir": str(folder / "data"),
        "output_dir": str(folder / "out"),
        "checkpoint_dir": str(folder / "checkpoints"),
        "compilation_cache_dir": cache_dir(),
        "max_seq_length": 128,
        "shard_size_gb": 8_000 / 2**30,
    }
    return RunConfig(**flags | changes)


@pytest.fixture
def out(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "out"))


def claims(out: Path, worker: int = 0, **options) -> ShardClaims:
    return ShardClaims(LocalStore(out), Owner.of_this_process(worker), lambda shard: False, **options)


def unfinish(out: Path, shard: str, keep: int = 1) -> int:
    """Takes all but the first records of a shard away; returns the samples that are left."""
    records = sorted((out / shard).glob("shard_*.json"))
    for record in records[keep:]:
        record.unlink()
    return sum(CommitRecord.from_bytes(record.read_bytes()).n_samples for record in records[:keep])


def shard(fleet, name: str) -> ShardStatus:
    return next(shard for shard in fleet.shards if shard.shard == name)


def test_a_finished_run_is_finished_and_counts_every_sample(out):
    fleet = status(str(out))
    assert (fleet.finished, fleet.settled, fleet.eta_s, fleet.workers) == (True, True, 0.0, 0)
    assert (fleet.samples, fleet.expected_samples, fleet.states) == (N_LINES, N_LINES, {"finished": N_SHARDS})
    assert fleet.samples_per_second is not None
    assert shard(fleet, "shard_000").owner["pid"] == os.getpid()
    assert json.loads(json.dumps(fleet.to_json()))["finished"] is True


def test_every_shard_says_in_which_state_it_is(out, pristine):
    sizes = {entry.name: entry.num_tasks for entry in read_dataset(str(pristine.parent / "data")).shards}
    kept = {name: unfinish(out, name) for name in ("shard_000", "shard_001", "shard_002")}
    shutil.rmtree(out / "shard_003")
    shutil.rmtree(out / "claims/shard_003")
    running = claims(out, 7).try_next(["shard_000"])
    silent = claims(out, 8, ttl_s=5.0).try_next(["shard_001"])
    running.report = lambda: {"samples": 1, "tokens": 2, "computed_samples": 3}
    running.beat()
    for name in (out / "claims/shard_001").iterdir():
        os.utime(name, (time.time() - 10, time.time() - 10))
    fleet = status(str(out))
    states = {found.shard: found.state for found in fleet.shards}
    assert states == {
        "shard_000": "running",
        "shard_001": "abandoned",
        "shard_002": "waiting",
        "shard_003": "waiting",
    }
    assert (fleet.finished, fleet.settled, fleet.workers) == (False, False, 1)
    assert fleet.samples == sum(kept.values())
    assert {found.shard: found.expected_samples for found in fleet.shards} == sizes
    assert shard(fleet, "shard_000").owner == {"worker_id": 7, "host": running.record.owner.host, "pid": os.getpid()}
    assert shard(fleet, "shard_000").computed_samples == 3
    assert 9 <= shard(fleet, "shard_001").silent_s <= 60
    assert silent.epoch == shard(fleet, "shard_001").lease == 2
    text = "\n".join(fleet.lines())
    assert "shard_000 running: " in text
    assert "shard_002 waiting" in text
    assert "shard_003" not in text


def test_a_shard_that_is_set_aside_says_why_until_it_is_to_be_tried_again(out):
    unfinish(out, "shard_001")
    for _ in range(3):
        claimant = claims(out)
        with claimant.try_next(["shard_001"]) as lease:
            claimant.record_failure(lease, "chunk_0000.jsonl:7: \x1b[31mbroken")
    assert claims(out).remaining(["shard_001"]) == []
    fleet = status(str(out))
    assert (fleet.finished, fleet.settled, fleet.states) == (False, True, {"finished": 3, "poisoned": 1})
    assert shard(fleet, "shard_001").error == "chunk_0000.jsonl:7: \x1b[31mbroken"
    assert any("?[31mbroken" in line for line in fleet.lines())
    assert not any("\x1b" in line for line in fleet.lines())
    with pytest.raises(UsageError, match="shard_9: not a shard of"):
        retry(str(out), ["shard_9"])
    assert retry(str(out), ["shard_001"]) == {"shard_001": 3}
    assert shard(status(str(out)), "shard_001").state == "waiting"
    assert claims(out).remaining(["shard_001"]) == ["shard_001"]
    assert poison_error(LocalStore(out), "shard_001", read_claims(LocalStore(out))["shard_001"]) is None


def test_a_record_that_is_damaged_or_lacks_its_file_ends_what_counts(out):
    first = unfinish(out, "shard_000", keep=2)
    (out / "shard_000/shard_0001.pkl.gz").unlink()
    found = shard(status(str(out)), "shard_000")
    assert (found.state, found.samples, found.error) == ("waiting", 0, "shard_000/shard_0001.pkl.gz is missing")
    (out / "shard_000/shard_0001.json").write_bytes(b"{")
    assert "shard_0001.json" in shard(status(str(out)), "shard_000").error
    assert first


def test_streams_of_their_own_need_no_claims(pristine, tmp_path):
    lines = write_jsonl(tmp_path / "s.jsonl", token_lines(20, longest=60))
    plain = {"use_sharded_dataset": False, "sharded_dataset_dir": None, "dataset_path": str(lines)}
    base = replace(config(pristine.parent), output_dir=str(tmp_path / "out"), **plain)
    extract(replace(base, worker_id=3, machine_id=0, total_machines=2))
    fleet = status(str(tmp_path / "out"))
    assert (fleet.finished, fleet.states) == (False, {"finished": 1})
    assert "machine 1 of 2" in fleet.notes[0]
    extract(replace(base, worker_id=4, machine_id=1, total_machines=2))
    fleet = status(str(tmp_path / "out"))
    assert (fleet.finished, fleet.samples, fleet.expected_samples) == (True, 20, 20)
    assert [found.shard for found in fleet.shards] == ["tpu_3", "tpu_4"]
    unfinish(tmp_path / "out", "tpu_3")
    fleet = status(str(tmp_path / "out"))
    assert (fleet.finished, fleet.eta_s, fleet.states) == (False, None, {"finished": 1, "unfinished": 1})
    assert shard(fleet, "tpu_3").silent_s < 60


def test_shards_without_the_list_of_all_shards_are_not_taken_for_everything(out):
    (out / "dataset.json").unlink()
    with pytest.raises(RunError, match=r"dataset\.json is missing"):
        status(str(out))


def test_no_run_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no run here"):
        status(str(tmp_path))


def test_a_watch_that_is_started_first_waits_for_the_run_to_begin(out):
    naps: list[float] = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 2:
            declaration.rename(out / "run.json")

    declaration = (out / "run.json").rename(out.parent / "moved.json")
    (seen,) = watch(str(out), 5.0, sleep)
    assert seen.finished
    assert naps == [5.0, 5.0]


def test_what_is_left_of_a_line_of_which_some_samples_are_committed_is_counted(out):
    """Windows end where the bytes say, so one may end between the samples of a line."""
    for number in range(N_SHARDS):
        unfinish(out, f"shard_{number:03d}", keep=number == 1)
    path = out / "shard_001/shard_0001.json"
    first = CommitRecord.from_bytes(path.read_bytes())
    half = replace(first, samples_per_record=4, n_samples=6, next_place=StreamPlace(11, 4 * 10 + 6))
    path.write_bytes(half.to_bytes())
    assert {found.expected_samples for found in status(str(out)).shards} == {4 * N_LINES // N_SHARDS}


def test_watching_ends_when_nothing_is_left_and_outlives_a_storage_fault(out, monkeypatch):
    unfinish(out, "shard_000")
    hidden = {path: path.read_bytes() for path in (out / "shard_000").glob("*")}
    seen = watch(str(out), 5.0, sleep=lambda seconds: naps.append(seconds))
    naps: list[float] = []
    assert not next(seen).settled
    listing = LocalStore.listing

    def fails_once(store, prefix=""):
        monkeypatch.setattr(LocalStore, "listing", listing)
        raise RunError("HTTP 503")

    monkeypatch.setattr(LocalStore, "listing", fails_once)
    assert not next(seen).settled
    assert naps == [5.0, 5.0]
    (out / "shard_000/shard_0002.json").write_bytes(last_record(hidden, out))
    assert next(seen).settled
    assert list(seen) == []


def last_record(hidden: dict[Path, bytes], out: Path) -> bytes:
    """A second and last record for the shard, naming the files of the first."""
    first = CommitRecord.from_bytes(hidden[out / "shard_000/shard_0001.json"])
    return replace(first, window=2, next_place=None, files=(), sites={}).to_bytes()


def test_a_refresh_in_a_bucket_costs_a_listing_and_what_is_new(out, monkeypatch):
    with FakeGcs() as server:
        for name, value in gcs_environment(server).items():
            monkeypatch.setenv(name, value)
        unfinish(out, "shard_000")
        lease = claims(out).try_next(["shard_000"])
        lease.beat()
        for path in out.rglob("*"):
            if path.is_file():
                server.state.insert("bucket", {"name": f"out/{path.relative_to(out)}"}, path.read_bytes(), {})
        fleet = FleetMonitor(open_store("gs://bucket/out"))
        assert fleet.refresh().states == {"finished": 3, "running": 1}
        before = len(server.requests)
        assert fleet.refresh().states == fleet.refresh().states
        assert [request.kind for request in server.requests[before:]] == ["object.list"] * 2
        beat = f"out/claims/shard_000/{lease.epoch:06d}.beat"
        before, stored = len(server.requests), server.objects()[beat]
        time.sleep(0.01)
        server.state.insert("bucket", {"name": beat}, stored, {})
        assert fleet.refresh().workers == 1
        assert [request.kind for request in server.requests[before:]] == ["object.list", "object.media"]
        assert all(found.silent_s is None or found.silent_s < 60 for found in fleet.refresh().shards)


def test_throughput_is_that_of_the_last_minutes_and_the_first_commit_only_starts_the_clock():
    assert rate_of([], 100.0) is None
    assert rate_of([Commit(10, 5, 50)], 100.0) is None
    assert rate_of([Commit(10, 5, 50), Commit(20, 6, 60)], 30.0) == (6 / 20, 60 / 20)
    old = [Commit(float(at), 1, 10) for at in range(0, 1000, 10)]
    late = [Commit(10_000.0 + at, 100, 1000) for at in range(0, 600, 10)]
    assert rate_of(old + late, 10_590.0) == pytest.approx((6000 / 9600, 60000 / 9600))
    assert rate_of(late, 10_590.0) == pytest.approx((59 * 100 / 590, 59 * 1000 / 590))
    # Fewer in the last minutes than say anything: the last eight, however old.
    slow = [Commit(1000.0 * n, 1, 1) for n in range(20)]
    assert rate_of(slow, 19_000.0) == pytest.approx((8 / 8000, 8 / 8000))
    assert rate_of([Commit(5, 1, 1), Commit(5, 1, 1)], 5.0) is None
    assert rate_of([Commit(10, 1, 1), Commit(20, 1, 1)], 0.0) == (0.1, 0.1)


def test_the_time_that_is_left_follows_from_what_is_left():
    commits = [Commit(0.0, 10, 10), Commit(10.0, 10, 10)]
    half = ShardStatus("a", "running", samples=20, expected_samples=120)
    assert fleet_status("u", [half], commits, 10.0).eta_s == 100.0
    assert fleet_status("u", [half, ShardStatus("b", "waiting")], commits, 10.0).eta_s is None
    poisoned = ShardStatus("b", "poisoned", samples=0, expected_samples=1000)
    assert fleet_status("u", [half, poisoned], commits, 10.0).eta_s == 100.0
    assert fleet_status("u", [half], commits[:1], 10.0).eta_s is None
    assert fleet_status("u", [], [], 0.0).finished is False


def test_what_a_terminal_would_obey_is_not_printed():
    assert ShardStatus("a", "poisoned", error="b\x1b[2J\nc\u202eñ").line() == "a poisoned: 0 samples, b?[2J?c?ñ"


def test_the_command_prints_one_json_object_for_each_look(out, tmp_path):
    result = run("analyze_activations.py", "status", out, "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["finished"] is True
    assert "4 finished" in result.stderr
    unfinish(out, "shard_000")
    kept = {path: path.read_bytes() for path in out.glob("shard_000/*")}
    timer = threading.Timer(4.0, lambda: (out / "shard_000/shard_0002.json").write_bytes(last_record(kept, out)))
    timer.start()
    watched = run("analyze_activations.py", "status", out, "--json", "--watch", "--interval", 0.5, cwd=tmp_path)
    timer.join()
    looks = [json.loads(line) for line in watched.stdout.splitlines()]
    assert [look["finished"] for look in looks] == [False] * (len(looks) - 1) + [True]
    assert len(looks) > 1
    wrong = run("analyze_activations.py", "retry", out, "shard_077", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "shard_077" in wrong.stderr
