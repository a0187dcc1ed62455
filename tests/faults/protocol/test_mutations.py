"""The suite fails when a safeguard is taken out: each of its checks is tried on code that lacks what it checks.

A change is made in this process, or in the workers, and put back afterwards. What must fail is a check of the other
files, called as it is there.
"""

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import test_damage
import test_preemption
import test_races
import test_zombies
from changes import CHANGES
from dict_store import DictStore
from fake_gcs import CommitThenReset, gcs_environment
from fleets import check_half_done, flags, wait_until
from forks import Fork
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from nursery import Worker
from protocol_model import Protocol, file_name
from test_lost_acknowledgements import PATIENT, lose_first

from core import activation_storage, object_store
from core.base import fault_points
from core.base.errors import RunError
from core.claims import leases
from core.claims.records import Owner
from core.commit import record as commit_record
from core.object_store import Created, RetryPolicy, gcs, local, open_store
from core.run import runner, sharded_run, stream_run

PATCHED = (activation_storage.ActivationStorage, commit_record, fault_points, gcs.GcsStore, local,
           object_store.LocalStore, runner, leases.Lease, leases.DatasetShardClaims, sharded_run, stream_run,
           stream_run._Bookkeeper, DictStore)  # fmt: skip


@contextmanager
def changed(change: Callable[[], None]) -> Iterator[None]:
    """This process with a change, which is undone."""
    before = [(owner, dict(vars(owner))) for owner in PATCHED]
    change()
    try:
        yield
    finally:
        for owner, attributes in before:
            for name, value in attributes.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)


@contextmanager
def must_fail() -> Iterator[None]:
    """The check inside must notice something."""
    with pytest.raises((AssertionError, TimeoutError, ValueError, FileNotFoundError, RunError)):
        yield


def check_model() -> None:
    run_state_machine_as_test(
        Protocol,
        settings=settings(
            max_examples=400,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            derandomize=True,
            report_multiple_bugs=False,
            # What is found needs no smallest example here.
            phases=[Phase.generate],
        ),
    )


def not_counted(row: str, times: int = 1) -> None:
    """The tally of a check that must fail."""


def check_races(store) -> None:
    with ThreadPoolExecutor(test_races.CLAIMANTS) as pool:
        for _ in range(20):
            (_,) = test_races.race(store, pool)
            store.delete(test_races.LEASE)


def ended_by_kill(worker: Fork) -> None:
    assert worker.wait() == -signal.SIGKILL, worker.errors


def test_without_create_only_on_a_disk_races_have_several_winners(place):
    with changed(CHANGES["files_replace_what_stands"]), must_fail():
        check_races(open_store(str(place)))


def test_without_create_only_on_a_disk_a_zombie_changes_what_is_committed(nursery, memory, place):
    """A zombie that holds a file of other rounding replaces the one that its successor committed."""
    data = test_zombies.make_dataset(place, test_zombies.N_LINES, 1)
    out = place / "out"
    options = {"change": "files_replace_what_stands"}
    zombie = nursery.start(Worker(flags(data, out, 1), fault="store.before@3=stop", **options))
    test_zombies.fall_asleep(zombie)
    nursery.start(Worker(flags(data, out, 2), rounding=test_zombies.OTHER_HARDWARE, **options)).finish()
    before = test_zombies.leave_alone(out)
    zombie.send_signal(signal.SIGCONT)
    zombie.wait()
    with must_fail():
        assert test_zombies.leave_alone(out) == before


def test_without_create_only_in_a_bucket_races_have_several_winners(bucket):
    with changed(CHANGES["uploads_replace_what_stands"]), must_fail():
        check_races(open_store("gs://bucket/out", RetryPolicy(base_s=0.002, cap_s=0.02)))


def test_without_create_only_the_model_is_left(monkeypatch):
    def overwrite(store, name, data):
        store.objects[name] = data
        return Created.CREATED

    monkeypatch.setattr(DictStore, "create_bytes", overwrite)
    with must_fail():
        check_model()


def test_without_reading_back_on_a_disk_an_owner_does_not_know_its_claim(place):
    def change_both() -> None:
        CHANGES["nobody_reads_back_on_a_disk"]()
        CHANGES["every_create_is_repeated"]()

    with changed(change_both):
        lease = leases.DatasetShardClaims(
            open_store(str(place / "claims")), Owner.of_this_process(0), lambda shard: False
        ).try_next(["shard_000"])
    with must_fail():
        assert lease is not None, "as in test_a_run_on_a_disk_knows_all_its_own_files"


def test_without_reading_back_in_a_bucket_an_owner_waits_for_itself(nursery, calm, bucket):
    data, _ = calm
    lose_first(bucket, CommitThenReset())
    worker = nursery.start(
        Worker(
            flags(data, "gs://bucket/out", **PATIENT),
            environment=gcs_environment(bucket),
            change="nobody_reads_back_in_a_bucket",
        )
    )
    with must_fail():
        assert worker.wait(4.0) == 0, worker.errors
    worker.kill()


def check_second_to_commit() -> None:
    """A worker stores a file and falls asleep, the file is lost, and other hardware makes and commits another."""
    model = Protocol()
    model.start()
    sleeper, successor = model.workers[:2]
    model.claim(0)
    model.upload(0)
    shard = sleeper.lease.dataset_shard
    model.store.delete(f"{shard}/{file_name(1)}")
    # Both believe to hold it.
    successor.lease, successor.storage, successor.window = sleeper.lease, model.storage_of(shard), 1
    model.upload(1)
    model.commit(1)
    model.commit(0)
    assert sleeper.storage.last_record == successor.storage.last_record


def test_without_reading_the_record_that_stands_a_worker_goes_on_from_what_nobody_committed():
    check_second_to_commit()
    with changed(CHANGES["nobody_reads_the_record_that_stands"]), must_fail():
        check_second_to_commit()


def test_a_checkpoint_before_its_commit_is_ahead_of_it(nursery, calm, place):
    data, files = calm
    out = place / "out"
    ended_by_kill(
        nursery.start(Worker(flags(data, out), fault="commit.before@3=kill", change="checkpoints_come_before_commits"))
    )
    with must_fail():
        check_half_done(out, files)


def test_a_record_before_its_files_names_what_is_not_there(nursery, calm, place):
    data, files = calm
    out = place / "out"
    ended_by_kill(
        nursery.start(Worker(flags(data, out), fault="commit.after@3=kill", change="records_come_before_files"))
    )
    with must_fail():
        check_half_done(out, files)


def test_leases_by_the_wall_clock_are_stolen_early(nursery, calm, place):
    from test_clocks import test_no_wall_clock_makes_a_worker_steal_or_wait as check

    start = nursery.start

    class Changed:
        @staticmethod
        def start(worker: Worker) -> Fork:
            return start(Worker(**vars(worker) | {"change": "leases_expire_by_the_wall_clock"}))

    # A shard that is done before its neighbour's clock is read cannot be stolen: some schedules give no chance to.
    with must_fail():
        for schedule in range(4):
            home = place / str(schedule)
            home.mkdir()
            check(schedule, Changed, calm, home, not_counted)


@pytest.mark.parametrize("change", ["leases_expire_at_once", "zombies_give_signs_of_life"])
def test_leases_that_are_not_respected_are_found_by_the_model(change):
    with changed(CHANGES[change]), must_fail():
        check_model()


def test_a_heartbeat_without_progress_keeps_the_shard_of_a_hung_worker(nursery, calm, place):
    data, _ = calm
    out = place / "out"
    hung = nursery.start(
        Worker(
            flags(data, out, claim_stall_s=0.6), fault="encode.after@3=hang", change="hung_workers_give_signs_of_life"
        )
    )
    wait_until(lambda: bool(list(out.glob("claims/*/000001.json"))))
    other = nursery.start(Worker(flags(data, out, 1)))
    with must_fail():
        other.wait(4.0)
    for worker in (hung, other):
        worker.kill()


def test_signals_that_wait_for_the_main_thread_come_too_late(nursery, calm, place):
    data, _ = calm
    out = place / "out"
    worker = nursery.start(
        Worker(flags(data, out, stop_grace_s=0.5), stuck_after=2, change="signals_wait_for_the_main_thread")
    )
    wait_until(lambda: bool(list(out.glob("claims/*/000001.json"))))
    time.sleep(0.5)
    worker.send_signal(signal.SIGTERM)
    with must_fail():
        worker.wait(0.5 + test_preemption.SLACK_S)
    worker.kill()


def test_records_without_a_checksum_hide_a_flipped_byte(nursery, memory, place):
    data = test_zombies.make_dataset(place, 12, 2)
    nursery.start(Worker(flags(data, place / "out"))).finish()
    (place / "copies").mkdir()
    with changed(CHANGES["records_carry_no_checksum"]), must_fail():
        test_damage.test_every_byte_of_a_record_counts(place / "out", place / "copies", not_counted)
