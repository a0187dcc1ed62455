"""Workers that share a sharded dataset: whatever happens to them, the result is that of a single undisturbed worker."""

import gzip
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from fake_gcs import FakeGcs, gcs_environment
from forks import Fork, shared
from tiny_run import (
    arc_lines,
    cache_dir,
    committed_files,
    environment,
    extract,
    token_lines,
    write_jsonl,
    write_model,
)

from analysis.fleet_status.status import retry
from analysis.verification.verify import verify
from core.base.errors import RunError, UsageError
from core.commit.record import CommitRecord
from core.object_store import LocalStore
from core.pricing.plan import price_run
from core.run.config import RunConfig
from core.run.runner import run
from core.run.sharded_run import ShardedSummary, is_dataset_shard_finished, is_machine_fault
from core.streams.sharded_dataset import read_dataset, write_dataset

N_LINES, N_SHARDS = 260, 6
FLAGS = {"max_seq_length": 128, "shard_size_gb": 0.0001, "claim_heartbeat_s": 0.2, "claim_ttl_s": 3.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def dataset(folder: Path, lines: list, num_shards: int) -> Path:
    source = write_jsonl(folder / "source.jsonl", lines)
    write_dataset(source, len(lines), str(folder / "data"), num_shards=num_shards, chunk_size_mb=0.005)
    return folder / "data"


@pytest.fixture(scope="module")
def calm(model, tmp_path_factory) -> tuple[Path, Path]:
    """A dataset, and what one undisturbed worker makes of it."""
    folder = tmp_path_factory.mktemp("calm")
    data = dataset(folder, token_lines(N_LINES, longest=60), N_SHARDS)
    summary = run(config(model, data, folder / "out"))
    assert (summary.status, summary.samples, summary.exit_code) == ("complete", N_LINES, 0)
    return data, folder / "out"


def config(model: Path, data: Path, out: Path, **flags) -> RunConfig:
    return RunConfig(
        model_path=str(model),
        use_sharded_dataset=True,
        sharded_dataset_dir=str(data),
        output_dir=str(out),
        checkpoint_dir=str(out.parent / "checkpoints"),
        compilation_cache_dir=cache_dir(),
        **(FLAGS | flags),
    )


def start(
    model: Path, data: object, out: object, cwd: Path, worker: int, *, changes: dict | None = None, **env: str
) -> Fork:
    """A worker as a process of its own."""
    flags = [part for name, value in (FLAGS | (changes or {})).items() for part in (f"--{name}", str(value))]
    return shared().command(
        "extract_activations.py", "--model_path", model, "--use_sharded_dataset", "--sharded_dataset_dir", data,
        "--output_dir", out, "--worker_id", worker, "--compilation_cache_dir", cache_dir(), "--json", *flags,
        cwd=cwd, env=environment(**env),
    )  # fmt: skip


def outputs(files: dict[str, bytes]) -> dict[str, bytes]:
    """What must not depend on who worked when: all but claims."""
    return {name: data for name, data in files.items() if not name.startswith("claims/")}


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def half_done_shard(out: Path, pids: set[int]) -> int | None:
    """The process among `pids` that holds a shard with a committed window that is not the last."""
    for lease in out.glob("claims/*/000001.json"):
        pid = json.loads(lease.read_text())["owner"]["pid"]
        records = list((out / lease.parent.name).glob("shard_*.json"))
        if pid in pids and not lease.with_suffix(".released").exists() and 1 <= len(records) <= 2:
            return pid
    return None


def pause_midway(out: Path, pids: set[int]) -> int:
    """Stops the process that is in the middle of a shard; one that finished it before the signal goes on."""
    while True:
        wait_until(lambda: half_done_shard(out, pids) is not None)
        pid = half_done_shard(out, pids)
        if pid is None:
            continue
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.05)
        if half_done_shard(out, {pid}) == pid:
            return pid
        os.kill(pid, signal.SIGCONT)


def test_three_workers_of_which_one_is_killed_leave_what_one_undisturbed_worker_leaves(model, calm, tmp_path):
    data, calm_out = calm
    out = tmp_path / "out"
    workers = {worker.pid: worker for worker in (start(model, data, out, tmp_path, number) for number in range(3))}
    victim = workers.pop(pause_midway(out, set(workers)))
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    replacement = start(model, data, out, tmp_path, 0)
    summaries = [worker.finish() for worker in (*workers.values(), replacement)]
    assert outputs(committed_files(out)) == outputs(committed_files(calm_out))
    report = verify(str(out))
    assert report.ok, report.lines()
    assert sum(folder.samples for folder in report.folders) == N_LINES
    taken_over = [json.loads(path.read_text()) for path in out.glob("claims/*/000002.json")]
    assert victim.pid in [lease["replaces"]["pid"] for lease in taken_over]
    finished = [shard for summary in summaries for shard in summary["finished_shards"]]
    assert len(finished) == len(set(finished))
    assert {summary["status"] for summary in summaries} == {"complete"}


def test_a_worker_that_wakes_up_after_its_shard_was_taken_over_changes_nothing(model, calm, tmp_path):
    data, calm_out = calm
    out = tmp_path / "out"
    zombie = start(model, data, out, tmp_path, 0)
    pause_midway(out, {zombie.pid})
    try:
        assert run(config(model, data, out, claim_ttl_s=0.5)).status == "complete"
        before = outputs(committed_files(out))
    finally:
        zombie.send_signal(signal.SIGCONT)
    assert zombie.finish()["status"] == "complete"
    # What the zombie was writing when it was stopped is gone as well.
    assert len(list(out.glob("claims/*/000002.json"))) >= 1
    assert outputs(committed_files(out)) == outputs(committed_files(calm_out))
    assert {name for name in before if ".tmp~" not in name} == set(outputs(committed_files(calm_out)))


def test_two_workers_in_a_bucket_leave_what_one_undisturbed_worker_leaves(model, calm, tmp_path):
    data, calm_out = calm
    with FakeGcs() as server:
        for path in data.rglob("*.json*"):
            server.state.insert("bucket", {"name": f"data/{path.relative_to(data)}"}, path.read_bytes(), {})
        gs = ("gs://bucket/data", "gs://bucket/out", tmp_path)
        # On a busy machine a worker may be held up for longer than a short TTL, or start when all is done.
        env = {"changes": {"claim_ttl_s": 60.0}} | gcs_environment(server)
        workers = [start(model, *gs, number, **env) for number in range(2)]
        summaries = [worker.finish() for worker in workers]
        stored = {name: blob for name, blob in server.objects().items() if name.startswith("out/")}
        rewritten = [name for name in stored if len(server.generations(name)) > 1]
    stored = {name.removeprefix("out/"): blob for name, blob in stored.items()}
    assert outputs(stored) == outputs(committed_files(calm_out))
    assert all(name.endswith((".beat", "/metadata.json")) for name in rewritten)
    finished = [shard for summary in summaries for shard in summary["finished_shards"]]
    assert sorted(finished) == [f"shard_{index:03d}" for index in range(N_SHARDS)]
    assert sum(summary["samples"] for summary in summaries) == N_LINES


def test_sigterm_gives_the_shard_back_and_the_next_worker_goes_on_at_once(model, tmp_path):
    data, out = dataset(tmp_path, token_lines(900, longest=100), 2), tmp_path / "out"
    worker = start(model, data, out, tmp_path, 0)
    wait_until(lambda: half_done_shard(out, {worker.pid}) is not None)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 143, worker.errors
    assert json.loads(worker.output)["status"] == "stopped"
    (released,) = (json.loads(path.read_text()) for path in out.glob("claims/*/*.released"))
    assert released["reason"] == "stopped"
    never = {"claim_heartbeat_s": 1000.0, "claim_ttl_s": 2000.0}
    assert run(config(model, data, out, **never)).status == "complete"
    assert run(config(model, data, tmp_path / "calm")).status == "complete"
    assert outputs(committed_files(out)) == outputs(committed_files(tmp_path / "calm"))


def test_sample_indices_go_on_from_shard_to_shard(model, tmp_path):
    data = dataset(tmp_path, arc_lines(5), 2)
    run(config(model, data, tmp_path / "out", predictions_per_task=2, max_seq_length=1024))
    table = {}
    for shard in ("shard_000", "shard_001"):
        records = [
            CommitRecord.from_bytes(path.read_bytes()) for path in (tmp_path / "out" / shard).glob("shard_*.json")
        ]
        table[shard] = (min(r.first_sample_idx for r in records), max(r.last_sample_idx for r in records))
    assert table == {"shard_000": (0, 5), "shard_001": (6, 9)}
    assert verify(str(tmp_path / "out")).ok


def test_a_dataset_gives_the_prompts_of_the_same_lines_in_one_stream(model, tmp_path):
    """Augmentation follows the position, so cutting a stream into shards changes no activation."""
    data = dataset(tmp_path, arc_lines(5), 2)
    flags = {"predictions_per_task": 2, "max_seq_length": 1024, "shard_size_gb": 1.0}
    sharded = config(model, data, tmp_path / "out", **flags)
    run(sharded)
    whole = replace(
        sharded,
        use_sharded_dataset=False,
        sharded_dataset_dir=None,
        dataset_path=str(tmp_path / "source.jsonl"),
        output_dir=str(tmp_path / "whole"),
    )
    run(whole)

    def samples(folder: Path) -> list[str]:
        return gzip.decompress((folder / "samples_0001.jsonl.gz").read_bytes()).decode().splitlines()

    parts = samples(tmp_path / "out/shard_000") + samples(tmp_path / "out/shard_001")
    assert parts == samples(tmp_path / "whole/tpu_0")


def test_a_shard_alone_can_be_extracted_as_a_stream(model, calm, tmp_path):
    data, _ = calm
    flags = {"use_sharded_dataset": False, "sharded_dataset_dir": None, "dataset_path": str(data / "shard_002")}
    for machine in range(2):
        out = str(tmp_path / "out")
        share = {"machine_id": machine, "total_machines": 2, "worker_id": machine, "output_dir": out}
        assert run(replace(config(model, data, tmp_path), **flags, **share)).status == "complete"
    report = verify(str(tmp_path / "out"))
    assert report.ok, report.lines()
    assert sum(folder.samples for folder in report.folders) == read_dataset(str(data)).shards[2].num_tasks


def test_a_poison_shard_is_set_aside_and_the_others_are_done(model, tmp_path):
    lines = token_lines(40, longest=60)
    lines[25] = {"input_ids": [5, 1_000_000]}
    data = dataset(tmp_path, lines, 4)
    summary = run(config(model, data, tmp_path / "out"))
    assert isinstance(summary, ShardedSummary)
    assert (summary.status, summary.exit_code, summary.samples) == ("incomplete", 1, 30)
    assert sorted(summary.finished_shards) == ["shard_000", "shard_001", "shard_003"]
    assert list(summary.set_aside) == ["shard_002"]
    assert "shard_002/chunk_" in summary.set_aside["shard_002"]
    assert any("SET ASIDE shard_002" in line for line in summary.lines())
    assert len(list((tmp_path / "out/claims/shard_002/failures").iterdir())) == 3
    again = run(config(model, data, tmp_path / "out"))
    assert (again.status, again.samples) == ("incomplete", 0)
    assert not verify(str(tmp_path / "out")).ok
    assert retry(str(tmp_path / "out"), ["shard_002"]) == {"shard_002": 3}
    patient = run(config(model, data, tmp_path / "out", max_bad_records=1))
    assert (patient.status, patient.samples, patient.bad_records) == ("complete", 9, 1)
    assert verify(str(tmp_path / "out")).ok


def test_three_failing_shards_in_a_row_end_the_worker(model, tmp_path):
    data = dataset(tmp_path, [{"input_ids": [1_000_000]}] * 8, 8)
    with pytest.raises(RunError, match="failed one after another"):
        run(config(model, data, tmp_path / "out"))
    assert len(list((tmp_path / "out/claims").glob("*/failures/*"))) == 3


def test_a_full_disk_is_the_machines_fault_and_no_shards(model, calm, tmp_path, monkeypatch):
    data, _ = calm
    monkeypatch.setattr(LocalStore, "free_bytes", lambda self: 10)
    with pytest.raises(RunError, match="where 10 B are free"):
        run(config(model, data, tmp_path / "out"))
    assert not list((tmp_path / "out/claims").glob("*/failures"))
    assert [json.loads(p.read_text())["reason"] for p in (tmp_path / "out/claims").glob("*/*.released")] == ["failed"]


def test_faults_are_told_apart_by_what_caused_them():
    def caused(error: Exception, cause: Exception | None) -> Exception:
        error.__cause__ = cause
        return error

    assert is_machine_fault(caused(RunError("a"), caused(RunError("b"), OSError("c"))))
    assert is_machine_fault(caused(RunError("a"), aiohttp.ClientPayloadError()))
    assert is_machine_fault(MemoryError())
    assert is_machine_fault(UsageError("a"))
    assert not is_machine_fault(RunError("x.jsonl:3: broken"))
    assert not is_machine_fault(KeyError("a"))
    assert not is_machine_fault(caused(RunError("a"), EOFError("cut off")))


def test_another_dataset_or_plan_in_the_same_output_is_refused_before_anything_is_written(model, calm, tmp_path):
    data, _ = calm
    out = tmp_path / "out"
    first = config(model, data, out, max_tasks=4)
    run(first)
    before = committed_files(out)
    (tmp_path / "other").mkdir()
    other = dataset(tmp_path / "other", token_lines(10, seed=9), 2)
    for changed in (
        replace(first, sharded_dataset_dir=str(other)),
        replace(first, max_tasks=None),
        replace(first, dtype="float32"),
    ):
        with pytest.raises(UsageError, match="belongs to another run"):
            run(changed)
    assert committed_files(out) == before


def test_max_tasks_counts_from_the_start_of_the_dataset(model, calm, tmp_path):
    data, _ = calm
    sizes = [shard.num_tasks for shard in read_dataset(str(data)).shards]
    summary = run(config(model, data, tmp_path / "out", max_tasks=sizes[0] + 3))
    assert (summary.status, summary.samples) == ("complete", sizes[0] + 3)
    assert sorted(summary.finished_shards) == ["shard_000", "shard_001"]
    released = [json.loads(path.read_text())["reason"] for path in (tmp_path / "out/claims").glob("*/000001.released")]
    assert released == ["done", "done"]
    assert verify(str(tmp_path / "out")).ok


def test_verify_misses_a_shard_that_nobody_began(model, calm, tmp_path):
    out = Path(shutil.copytree(calm[1], tmp_path / "out"))
    shutil.rmtree(out / "shard_003")
    report = verify(str(out))
    assert [folder.folder for folder in report.folders if folder.problems] == ["shard_003"]
    assert verify(str(out), allow_unfinished=True).ok


DAMAGES = {
    "a whole shard": "shard_002",
    "a file": "shard_002/shard_0001.pkl.gz",
    "a sample table": "shard_002/samples_0002.jsonl.gz",
    "a record with others after it": "shard_002/shard_0001.json",
    "the last record": "last",
    "the folder metadata": "shard_002/metadata.json",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_finished_run_has_lost_is_made_again(damage, model, calm, tmp_path):
    data, calm_out = calm
    out = Path(shutil.copytree(calm_out, tmp_path / "out"))
    lost = max(out.glob("shard_002/shard_*.json")) if DAMAGES[damage] == "last" else out / DAMAGES[damage]
    if lost.is_dir():
        shutil.rmtree(lost)
    else:
        lost.unlink()
    assert not is_dataset_shard_finished(LocalStore(out), "shard_002")
    assert verify(str(out)).ok == (damage == "the folder metadata")
    summary = run(config(model, data, out))
    assert (summary.status, summary.finished_shards) == ("complete", ("shard_002",))
    assert outputs(committed_files(out)) == outputs(committed_files(calm_out))
    assert [path.parent.name for path in out.glob("claims/*/000002.json")] == ["shard_002"]
    assert run(config(model, data, out)).samples == 0


def test_the_plan_covers_all_shards_and_writes_nothing(model, calm, tmp_path):
    data, _ = calm
    report = price_run(config(model, data, tmp_path / "out", plan=True))
    assert report.samples == N_LINES
    assert report.shards == len(list(calm[1].glob("shard_*/shard_*.json")))
    assert not (tmp_path / "out").exists()


def test_the_preferred_shard_is_done_first(model, calm, tmp_path):
    data, _ = calm
    summary = run(config(model, data, tmp_path / "out", preferred_shard_id=4))
    assert summary.finished_shards[0] == "shard_004"
    with pytest.raises(UsageError, match="--preferred_shard_id 6"):
        run(config(model, data, tmp_path / "out", preferred_shard_id=6))


WRONG_FLAGS = {
    "both": ({"dataset_path": "s.jsonl"}, "--dataset_path"),
    "no folder": ({"sharded_dataset_dir": None}, "--sharded_dataset_dir"),
    "machines": ({"total_machines": 2}, "--total_machines 2"),
    "not used": ({"use_sharded_dataset": False, "dataset_path": "s.jsonl"}, "--sharded_dataset_dir"),
    "impatient": ({"claim_ttl_s": 0.3}, "--claim_ttl_s 0.3"),
    "for ever": ({"claim_ttl_s": math.inf}, "--claim_ttl_s inf"),
    "longer than anything waits": ({"claim_heartbeat_s": 1e12, "claim_ttl_s": 2e12}, "--claim_heartbeat_s 10{12}"),
    "no number": ({"claim_stall_s": math.nan}, "--claim_stall_s nan"),
    "no end": ({"stop_grace_s": math.inf}, "--stop_grace_s inf"),
    "negative": ({"preferred_shard_id": -1}, "--preferred_shard_id -1"),
}


@pytest.mark.parametrize("case", WRONG_FLAGS)
def test_flags_that_do_not_go_together_are_refused(case, model, calm, tmp_path):
    changes, named = WRONG_FLAGS[case]
    with pytest.raises(UsageError, match=named):
        replace(config(model, calm[0], tmp_path / "out"), **changes)


def test_a_folder_that_is_no_dataset_is_one_line(model, tmp_path):
    result = extract(
        tmp_path,
        "--model_path",
        model,
        "--use_sharded_dataset",
        "--sharded_dataset_dir",
        tmp_path,
        "--output_dir",
        "out",
    )
    assert result.returncode == 2
    assert f"error: {tmp_path}: no master_metadata.json" in result.stderr
    assert not os.path.exists(tmp_path / "out")
