"""SIGTERM ends a worker in time whatever it is doing, and a worker that hangs keeps its shard from nobody."""

import json
import signal
import time
from pathlib import Path

import pytest
from fake_gcs import Stall, gcs_environment
from fleets import check_committed, check_finished, flags, is_full, leave_alone, make_dataset, sample, wait_until
from forks import Fork
from nursery import Worker

from core.base.signals import STOP_GRACE_S

# Nobody takes over from a live or dead worker: only a shard that was given back is free.
NEVER = {"claim_ttl_s": 2000.0, "claim_heartbeat_s": 1000.0}
# On a busy machine.
SLACK_S = 2.0
GRACES = [1.0, STOP_GRACE_S] if is_full() else [1.0]


def claimed(out: Path) -> bool:
    return bool(list(out.glob("claims/*/000001.json")))


def releases(out: Path) -> list[str]:
    return sorted(json.loads(path.read_text())["reason"] for path in out.glob("claims/*/*.released"))


def seconds_to_end(worker: Fork, number: int = signal.SIGTERM) -> float:
    started = time.monotonic()
    worker.send_signal(number)
    worker.wait(60.0)
    return time.monotonic() - started


@pytest.mark.parametrize("grace_s", GRACES)
def test_a_step_that_does_not_end_does_not_keep_sigterm_from_ending_the_worker(grace_s, nursery, calm, place):
    data, files = calm
    out = place / "out"
    worker = nursery.start(Worker(flags(data, out, stop_grace_s=grace_s, **NEVER), stuck_after=6, step_s=0.01))
    wait_until(lambda: len(list(out.glob("*/shard_[0-9]*.json"))) >= 2)
    time.sleep(0.3)
    seconds = seconds_to_end(worker)
    assert worker.returncode == 143
    assert grace_s <= seconds <= min(grace_s + SLACK_S, 20.0)
    assert "dropping uncommitted work" in worker.errors
    check_committed(out, files)
    assert releases(out)[-1] == "stopped"
    assert not list(out.glob("claims/*/failures"))
    successor = nursery.start(Worker(flags(data, out, **NEVER)))
    assert successor.finish()["status"] == "complete"
    check_finished(out, files)


@pytest.mark.parametrize("stalled", ["activations", "everything"])
def test_a_storage_that_does_not_answer_does_not_keep_sigterm_from_ending_the_worker(stalled, nursery, calm, bucket):
    data, _ = calm
    uploads = []

    def is_stalled(call) -> bool:
        if call.kind.startswith("upload") and ".pkl" in call.object:
            uploads.append(call.object)
        return bool(uploads) and (stalled == "everything" or (call.kind.startswith("upload") and ".pkl" in call.object))

    bucket.faults.add(is_stalled, Stall(30.0), times=None)
    environment = gcs_environment(bucket)
    retry = {"base_s": 0.005, "read_timeout_s": 60.0}
    wanted = flags(data, "gs://bucket/out", stop_grace_s=1.0, **NEVER)
    worker = nursery.start(Worker(wanted, environment=environment, retry=retry))
    wait_until(lambda: bool(uploads))
    seconds = seconds_to_end(worker)
    assert worker.returncode == 143
    # What gives the lease back may wait three seconds for an answer.
    assert seconds <= 1.0 + 3.0 + SLACK_S
    released = [name for name in bucket.objects() if name.endswith(".released")]
    assert len(released) == (stalled == "activations")


def test_a_worker_that_can_finish_in_time_commits_what_is_computed(nursery, calm, place):
    data, files = calm
    out = place / "out"
    worker = nursery.start(Worker(flags(data, out, **NEVER), step_s=0.05))
    wait_until(lambda: len(list(out.glob("*/shard_[0-9]*.json"))) >= 2)
    assert seconds_to_end(worker) < 5.0
    assert worker.returncode == 143
    assert "dropping" not in worker.errors
    check_committed(out, files)
    assert not list(out.rglob(".tmp~*"))
    assert releases(out)[-1] == "stopped"


def test_a_second_signal_ends_at_once(nursery, calm, place):
    data, _ = calm
    worker = nursery.start(Worker(flags(data, place / "out", stop_grace_s=60.0, **NEVER), stuck_after=2))
    wait_until(lambda: claimed(place / "out"))
    time.sleep(0.3)
    worker.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert worker.returncode is None
    assert seconds_to_end(worker, signal.SIGINT) < SLACK_S
    assert worker.returncode == 130


def test_a_worker_that_waits_for_others_ends_at_once(nursery, calm, place):
    data, _ = calm
    out = place / "out"
    holds = {"fault": "store.before@1=stop"}
    holders = [nursery.start(Worker(flags(data, out, number, **NEVER), **holds)) for number in range(6)]
    wait_until(lambda: len(list(out.glob("claims/*/000001.json"))) == 6)
    waiting = nursery.start(Worker(flags(data, out, 7, **NEVER)))
    wait_until(lambda: "waiting: other workers hold the remaining dataset shards" in waiting.errors)
    assert seconds_to_end(waiting) < SLACK_S
    assert waiting.returncode == 143
    for holder in holders:
        holder.kill()


def test_preemptions_do_not_count_against_a_shard(nursery, calm, place):
    data, files = calm
    out = place / "out"
    for number, end in enumerate([signal.SIGTERM, signal.SIGKILL] * 3):
        worker = nursery.start(Worker(flags(data, out, stop_grace_s=0.1), fault="store.before@1=hang"))
        wait_until(lambda n=number: len(list(out.glob("claims/*/*[0-9].json"))) > n)
        seconds_to_end(worker, end)
    assert not list(out.glob("claims/*/failures"))
    nursery.start(Worker(flags(data, out))).finish()
    check_finished(out, files)


HANGS = ["a step", "encode.after@3=hang", "store.before@4=hang", "commit.before@2=hang", "checkpoint.before@1=hang"]


@pytest.mark.parametrize("where", sample(HANGS, 2))
def test_a_worker_that_hangs_falls_silent_and_its_shard_passes_on(where, nursery, calm, place):
    data, files = calm
    out = place / "out"
    wanted = flags(data, out, claim_stall_s=0.6)
    hung = nursery.start(Worker(wanted, stuck_after=4) if where == "a step" else Worker(wanted, fault=where))
    wait_until(lambda: "no progress for" in hung.errors)
    assert hung.returncode is None
    assert nursery.start(Worker(flags(data, out, 1))).finish()["status"] == "complete"
    check_finished_beside_a_hung_one(out, files)
    assert len(list(out.glob("claims/*/000002.json"))) == 1
    hung.kill()
    hung.wait()


def check_finished_beside_a_hung_one(out: Path, files: dict[str, bytes]) -> None:
    """What the hung one was writing lies there under a hidden name until the next start."""
    for path in out.rglob(".tmp~*"):
        path.unlink()
    check_finished(out, files)


def test_work_that_is_slow_but_goes_on_keeps_its_shard(nursery, place):
    data = make_dataset(place, n_lines=48, n_shards=1)
    nursery.start(Worker(flags(data, place / "calm/out"))).finish()
    out = place / "out"
    # Silent after half a second without progress it would lose the shard midway, but not to a busy machine.
    patient = {"claim_stall_s": 0.5, "claim_ttl_s": 1.5}
    slow = nursery.start(Worker(flags(data, out, **patient), step_s=0.15))
    wait_until(lambda: claimed(out))
    other = nursery.start(Worker(flags(data, out, 1, **patient)))
    assert slow.finish()["status"] == other.finish()["status"] == "complete"
    assert not list(out.glob("claims/*/000002.json"))
    check_finished(out, leave_alone(place / "calm/out"), n_lines=48)
