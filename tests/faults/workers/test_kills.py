"""SIGKILL at every instrumented point, and at random: the result is that of a single undisturbed worker."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_gcs import gcs_environment
from fleets import (
    LARGE,
    LARGE_WIDTH,
    N_LINES,
    check_committed,
    check_finished,
    check_half_done,
    counts,
    flags,
    is_full,
    leave_alone,
    make_dataset,
    outputs,
    sample,
    sample_indices,
    start_fleet,
    wait_until,
)
from nursery import Nursery, Worker
from tally import KILLS_AT_POINTS, KILLS_AT_RANDOM, KILLS_IN_A_BUCKET, SCALING
from tiny_run import committed_files, token_lines

from analysis.verification.verify import verify
from core.base.fault_points import POINTS

BUCKET_POINTS = ("mirror.before", "mirror.after", "bucket.sent", "bucket.chunk")
FAILURE_POINTS = ("failure.before", "failure.after")
LOCAL_POINTS = tuple(point for point in POINTS if point not in BUCKET_POINTS + FAILURE_POINTS)
ONCE_A_SHARD = ("claim", "release", "beat", "index")
SEEDS = range(3)
# The victim is quicker than the others, so that it comes by every point often enough.
STEP_S, OTHERS_STEP_S = 0.01, 0.08


def kills(points: tuple[str, ...], quick: int) -> list[tuple[str, int]]:
    return sample([(point, seed) for point in points for seed in SEEDS], quick)


def which_time(point: str, seed: int) -> int:
    """Early enough that a worker with three others beside it comes by so often; some points come once a shard."""
    return random.Random(f"{point} {seed}").randint(1, 1 + seed * (1 if point.startswith(ONCE_A_SHARD) else 2))


def test_every_instrumented_point_is_somewhere_in_the_code():
    root = Path(__file__).parents[3] / "core"
    text = "".join(path.read_text() for path in root.rglob("*.py") if path.name != "fault_points.py")
    assert [point for point in POINTS if f'fault_point("{point}")' not in text] == []


@pytest.mark.parametrize(("point", "seed"), kills(LOCAL_POINTS, 7))
def test_a_kill_at_a_point_changes_nothing_in_the_result(point, seed, nursery, calm, place, tally):
    data, files = calm
    out = place / "out"
    fault = f"{point}@{which_time(point, seed)}=kill"
    victim = nursery.start(Worker(flags(data, out, 9, claim_heartbeat_s=0.02), fault=fault, step_s=STEP_S))
    others = start_fleet(nursery, data, out, 3, step_s=OTHERS_STEP_S)
    assert victim.wait() == -signal.SIGKILL, victim.errors
    check_half_done(out, files)
    replacement = nursery.start(Worker(flags(data, out, 9)))
    for worker in (*others, replacement):
        worker.finish()
    check_finished(out, files)
    assert leave_alone(out).keys() == outputs(committed_files(out)).keys(), "a dead process's temporary file is left"
    tally(KILLS_AT_POINTS)


@pytest.mark.parametrize(("point", "seed"), kills(BUCKET_POINTS, 2))
def test_a_kill_at_a_point_of_an_upload_changes_nothing_in_the_result(
    point, seed, nursery, calm_large, place, bucket, tally
):
    data, files = calm_large
    options = {"environment": gcs_environment(bucket), "upload_chunk": 256 << 10, "width": LARGE_WIDTH}

    def worker(number: int, **changes) -> Worker:
        # Each machine has a disk of its own for the local copy.
        upload = {"upload_to_gcs": True, "gcs_bucket": "bucket", "gcs_prefix": "out"}
        return Worker(flags(data, place / f"host{number}/out", number, **LARGE, **upload), **options | changes)

    victim = nursery.start(worker(9, fault=f"{point}@{which_time(point, seed)}=kill"))
    others = [nursery.start(worker(number, step_s=OTHERS_STEP_S)) for number in range(3)]
    assert victim.wait() == -signal.SIGKILL, victim.errors
    for running in (*others, nursery.start(worker(9))):
        running.finish()
    stored = {
        name.removeprefix("out/"): blob for name, blob in bucket.objects().items() if not name.endswith("metadata.json")
    }
    assert outputs(stored) == {name: data for name, data in files.items() if not name.endswith("metadata.json")}
    assert all(len(bucket.generations(f"out/{name}")) == 1 for name in outputs(stored))
    report = verify("gs://bucket/out")
    assert report.ok, report.lines()
    for number in (0, 1, 2, 9):
        check_committed(place / f"host{number}/out", files)
    tally(KILLS_AT_POINTS)


@pytest.mark.parametrize(("point", "seed"), kills(FAILURE_POINTS, 1))
def test_a_kill_while_an_error_is_noted_loses_only_that_note(point, seed, nursery, place, tally):
    lines = token_lines(N_LINES, longest=30)
    lines[25] = {"input_ids": [1_000_000]}
    data = make_dataset(place, lines=lines)
    victim = nursery.start(Worker(flags(data, place / "out"), fault=f"{point}@{1 + seed % 3}=kill"))
    assert victim.wait() == -signal.SIGKILL, victim.errors
    last = nursery.start(Worker(flags(data, place / "out")))
    assert last.wait() == 1
    assert "SET ASIDE shard_002" in last.errors
    # Windows before the broken line may be committed by the time that it is met.
    found = sample_indices(place / "out")
    before = [index for index in found if 20 <= index < 30]
    assert before == list(range(20, 20 + len(before)))
    assert len(before) <= 5
    assert [index for index in found if index not in before] == [i for i in range(N_LINES) if not 20 <= i < 30]
    tally(KILLS_AT_POINTS)


def test_a_successor_computes_nothing_that_is_committed(nursery, place):
    data = make_dataset(place, n_lines=30, n_shards=1)
    nursery.start(Worker(flags(data, place / "calm/out"))).finish()
    out = place / "out"
    victim = nursery.start(Worker(flags(data, out), fault="commit.after@4=kill"))
    assert victim.wait() == -signal.SIGKILL, victim.errors
    committed = len(sample_indices(out))
    assert 0 < committed < 30
    successor = nursery.start(Worker(flags(data, out, 1)))
    summary = successor.finish()
    assert (summary["samples"], summary["total_samples"]) == (30 - committed, 30)
    assert f"continuing at sample {committed}" in successor.errors
    check_finished(out, leave_alone(place / "calm/out"), n_lines=30)


def kill_and_replace(
    nursery: Nursery, worker: Callable[[int], Worker], check: Callable[[], None], wanted: int, rng: random.Random
) -> int:
    """Kills one of four workers after another and starts it again, until one of them finds everything done.

    Then lets the others end, and one more that must end well. Returns how many were killed.
    """
    fleet, killed = [nursery.start(worker(number)) for number in range(4)], 0
    while killed < wanted and all(running.returncode is None for running in fleet):
        time.sleep(rng.uniform(0, 0.2))
        victim = rng.randrange(len(fleet))
        fleet[victim].kill()
        killed += fleet[victim].wait() == -signal.SIGKILL
        check()
        fleet[victim] = nursery.start(worker(victim))
    for running in fleet:
        running.wait()
    nursery.start(worker(9)).finish()
    return killed


def test_kills_at_random_moments_change_nothing_in_the_result(nursery, place, tally):
    wanted = 200 if is_full() else 12
    data = make_dataset(place, n_lines=150, n_shards=8)
    nursery.start(Worker(flags(data, place / "calm/out"))).finish()
    files, rng = leave_alone(place / "calm/out"), random.Random(4)
    killed = round_number = 0
    while killed < wanted:
        out = place / f"round{round_number}/out"
        killed += kill_and_replace(
            nursery,
            lambda number, out=out: Worker(flags(data, out, number), step_s=0.02),
            lambda out=out: check_half_done(out, files),
            wanted - killed,
            rng,
        )
        check_finished(out, files, n_lines=150)
        round_number += 1
    tally(KILLS_AT_RANDOM, killed)


def test_kills_at_random_moments_change_nothing_in_a_bucket(nursery, place, bucket, tally):
    wanted = 50 if is_full() else 4
    data = make_dataset(place, n_lines=150, n_shards=8)
    nursery.start(Worker(flags(data, place / "calm/out"))).finish()
    files, rng = outputs(leave_alone(place / "calm/out")), random.Random(5)
    environment = gcs_environment(bucket)
    killed = round_number = 0
    while killed < wanted:
        prefix = f"round{round_number}/"

        def worker(number: int, prefix: str = prefix) -> Worker:
            return Worker(flags(data, f"gs://bucket/{prefix}", number), environment=environment, step_s=0.02)

        def stored(prefix: str = prefix) -> dict[str, bytes]:
            objects = bucket.objects().items()
            return {name.removeprefix(prefix): blob for name, blob in objects if name.startswith(prefix)}

        def check(stored=stored) -> None:
            there = {name: blob for name, blob in outputs(stored()).items() if not name.endswith("metadata.json")}
            assert there.items() <= files.items()

        killed += kill_and_replace(nursery, worker, check, wanted - killed, rng)
        assert outputs(stored()) == files
        assert all(len(bucket.generations(prefix + name)) == 1 for name in files if "metadata" not in name)
        round_number += 1
    tally(KILLS_IN_A_BUCKET, killed)


@pytest.mark.parametrize("attempt", counts(1, 5))
def test_workers_may_come_and_go_from_one_to_eight_to_three_to_one(attempt, nursery, place, tally):
    data = make_dataset(place, n_lines=200, n_shards=12)
    nursery.start(Worker(flags(data, place / "calm/out"))).finish()
    files = leave_alone(place / "calm/out")
    out, rng = place / "fleet/out", random.Random(attempt)

    def committed(share: float) -> bool:
        of = len(list((place / "calm/out").glob("*/shard_[0-9]*.json")))
        return len(list(out.glob("*/shard_[0-9]*.json"))) >= share * of

    fleet = start_fleet(nursery, data, out, 1, step_s=0.03)
    wait_until(lambda: committed(0.1))
    fleet += [nursery.start(Worker(flags(data, out, number), step_s=0.03)) for number in range(1, 8)]
    wait_until(lambda: committed(0.35))
    rng.shuffle(fleet)
    for worker in fleet[3:]:
        worker.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
    wait_until(lambda: committed(0.6))
    check_half_done(out, files)
    for worker in fleet[1:3]:
        worker.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
    assert fleet[0].finish()["status"] == "complete"
    # A worker that has not begun yet dies of SIGTERM like any process.
    assert {worker.wait() for worker in fleet} <= {0, 143, -signal.SIGKILL, -signal.SIGTERM}
    check_finished(out, files, n_lines=200)
    tally(SCALING)
