"""A disk that fills up: a clear error, nothing committed half, and a later run that succeeds."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleets import check_committed, check_finished, flags, sample
from nursery import Worker
from tally import FULL_DISK, SKIPPED


@pytest.fixture
def small_disk(place, record_property) -> Iterator[Path]:
    """A disk of a few hundred kilobytes."""
    disk = place / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "faults", str(disk)], capture_output=True)
    if mounted.returncode:
        record_property(SKIPPED, FULL_DISK)
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def check_full_disk_ended_it(worker, out: Path, files: dict[str, bytes]) -> None:
    assert worker.wait() == 1
    (error,) = [line for line in worker.errors.splitlines() if line.startswith("error: ")]
    assert "disk full: no space left to write" in error
    assert "run the same command again" in error
    check_committed(out, files)
    assert not list(out.rglob(".tmp~*")), "the room that a half-written file takes is needed"
    assert not list((out / "claims").glob("*/failures/*")), "a full disk says nothing about the data"


@pytest.mark.parametrize("kilobytes", sample([60, 120, 200, 280, 360], 2))
def test_a_full_disk_is_a_clear_error_and_a_later_run_succeeds(kilobytes, nursery, calm, small_disk, tally):
    data, files = calm
    out = small_disk / "out"
    resize(small_disk, f"{kilobytes}k")
    # The estimate at the start would refuse the run; here the disk is filled while it goes on.
    worker = Worker(flags(data, out, checkpoint_dir=str(data.parent / "small")), free_bytes=1 << 40)
    check_full_disk_ended_it(nursery.start(worker), out, files)
    resize(small_disk, "20m")
    nursery.start(worker).finish()
    check_finished(out, files)
    tally(FULL_DISK)


FULL_AT = ["disk.synced@3", "disk.synced@9", "encode.after@2", "store.before@4", "commit.before@2", "index.before@1",
           "checkpoint.before@2", "claim.before@2", "declare.before@1"]  # fmt: skip


@pytest.mark.parametrize("point", sample(FULL_AT, 3))
def test_a_write_that_finds_the_disk_full_ends_the_run_and_leaves_nothing_half(point, nursery, calm, place):
    """Where no small disk can be had, and at places that a real one rarely hits."""
    data, files = calm
    out = place / "out"
    worker = nursery.start(Worker(flags(data, out), fault=f"{point}=full"))
    assert worker.wait() == 1, worker.errors
    (error,) = [line for line in worker.errors.splitlines() if line.startswith("error: ")]
    assert os.strerror(errno.ENOSPC).lower() in error.lower() or "disk full" in error
    check_committed(out, files)
    assert not list((out / "claims").glob("*/failures/*"))
    nursery.start(Worker(flags(data, out))).finish()
    check_finished(out, files)
