"""A worker that is stopped past its TTL and wakes up: whoever commits first, the other one changes nothing."""

import random
import signal
from pathlib import Path

import pytest
from fleets import check_committed, counts, flags, leave_alone, make_dataset, sample, sample_indices, wait_until
from forks import Fork
from nursery import Worker
from tally import ZOMBIES

from analysis.verification.verify import verify

N_LINES = 30
# Where a worker may fall asleep with something in its hands.
POINTS = ("claim.after", "encode.after", "store.before", "store.after", "disk.synced", "disk.linked", "commit.before",
          "commit.after", "checkpoint.before", "index.before", "beat.before")  # fmt: skip
OTHER_HARDWARE = 1e-3


@pytest.fixture(scope="module")
def one_shard(nursery, memory) -> tuple[Path, dict[str, bytes]]:
    """A dataset of a single shard, so that a successor gets the very shard of the zombie."""
    data = make_dataset(memory / "one_shard", N_LINES, 1)
    nursery.start(Worker(flags(data, memory / "one_shard/out"))).finish()
    return data, leave_alone(memory / "one_shard/out")


def fault_of(number: int) -> str:
    point = POINTS[number % len(POINTS)]
    once = point in ("claim.after", "index.before")
    return f"{point}@{1 if once else random.Random(number).randint(1, 6)}=stop"


def fall_asleep(worker: Fork) -> None:
    wait_until(lambda: worker.is_stopped() or worker.returncode is not None)
    assert worker.returncode is None, worker.errors


def wake_up(worker: Fork) -> None:
    worker.send_signal(signal.SIGCONT)
    assert worker.finish()["status"] == "complete"


def check(out: Path, files: dict[str, bytes], rounding: float) -> None:
    """Identical to the undisturbed run; where two kinds of hardware took part, whole and consistent all the same."""
    report = verify(str(out))
    assert report.ok, report.lines()
    assert sample_indices(out) == list(range(N_LINES))
    if not rounding:
        check_committed(out, files)
        assert leave_alone(out) == files


def cases(quick: int) -> list[tuple[int, float]]:
    return sample([(number, OTHER_HARDWARE * (number % 2)) for number in range(25)], quick)


@pytest.mark.parametrize(("number", "rounding"), cases(4))
def test_a_zombie_that_wakes_up_when_all_is_committed_changes_nothing(
    number, rounding, nursery, one_shard, place, tally
):
    data, files = one_shard
    out = place / "out"
    zombie = nursery.start(Worker(flags(data, out, 1, claim_heartbeat_s=0.02), fault=fault_of(number), step_s=0.01))
    fall_asleep(zombie)
    assert nursery.start(Worker(flags(data, out, 2), rounding=rounding)).finish()["status"] == "complete"
    check(out, files, rounding)
    before = leave_alone(out)
    wake_up(zombie)
    assert leave_alone(out) == before
    check(out, files, rounding)
    tally(ZOMBIES)


@pytest.mark.parametrize(("number", "rounding"), cases(4))
def test_a_zombie_that_commits_before_its_successor_does_no_harm(number, rounding, nursery, one_shard, place, tally):
    data, files = one_shard
    out = place / "out"
    zombie = nursery.start(Worker(flags(data, out, 1, claim_heartbeat_s=0.02), fault=fault_of(number), step_s=0.01))
    fall_asleep(zombie)
    # What the successor has in hand when it is stopped is what the zombie writes meanwhile.
    asleep_at = ("store.before", "commit.before", "claim.after", "store.after")[number % 4]
    successor = nursery.start(Worker(flags(data, out, 2), rounding=rounding, fault=f"{asleep_at}@1=stop"))
    wait_until(lambda: successor.is_stopped() or successor.returncode is not None)
    wake_up(zombie)
    check(out, files, rounding)
    before = leave_alone(out)
    if successor.returncode is None:
        wake_up(successor)
    assert leave_alone(out) == before
    check(out, files, rounding)
    tally(ZOMBIES)


@pytest.mark.parametrize("attempt", counts(1, 2))
def test_two_workers_with_the_same_id_do_no_harm(attempt, nursery, calm, place):
    data, files = calm
    out = place / "out"
    twins = [nursery.start(Worker(flags(data, out, 3), step_s=0.01)) for _ in range(2)]
    summaries = [twin.finish() for twin in twins]
    assert leave_alone(out) == files
    finished = [shard for summary in summaries for shard in summary["finished_shards"]]
    assert len(finished) == len(set(finished)) == 6


@pytest.mark.parametrize("attempt", counts(1, 2))
def test_two_workers_with_the_same_id_and_stream_do_no_harm(attempt, nursery, place):
    data = make_dataset(place, N_LINES, 1)

    def worker(out: Path, **options) -> Worker:
        plain = {"use_sharded_dataset": False, "sharded_dataset_dir": None, "dataset_path": str(data / "shard_000")}
        return Worker(flags(data, out, 5) | plain, **options)

    nursery.start(worker(place / "calm/out")).finish()
    twins = [nursery.start(worker(place / "twins/out", step_s=0.01)) for _ in range(2)]
    for twin in twins:
        assert twin.finish()["status"] == "complete"
    assert leave_alone(place / "twins/out") == leave_alone(place / "calm/out")
    assert sample_indices(place / "twins/out") == list(range(N_LINES))
