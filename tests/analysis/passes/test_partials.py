"""Stored partials: an interrupted pass goes on; what is damaged is computed again, what is foreign is refused."""

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import environment
from light_passes import MatrixSum

from analysis.passes import PartialStore, RunnerChoice, run_pass
from core.base.errors import RunError

PARTS = list(range(11))


@pytest.fixture(scope="module")
def expected() -> bytes:
    return run_pass(MatrixSum(), PARTS)


def logged(folder: Path, **more) -> MatrixSum:
    folder.mkdir(exist_ok=True)
    return MatrixSum(log=str(folder), **more)


def test_a_pass_that_failed_goes_on_after_what_was_stored(tmp_path, expected):
    store = PartialStore(str(tmp_path / "analysis"))
    with pytest.raises(RunError):
        run_pass(logged(tmp_path / "first", bad=7), PARTS, partials=store)
    again = logged(tmp_path / "second")
    assert run_pass(again, PARTS, partials=store) == expected
    assert again.mapped() == PARTS[7:]
    third = logged(tmp_path / "third")
    assert run_pass(third, [*PARTS, 11], partials=store) != expected
    assert third.mapped() == [11]


def test_partials_of_blocks_are_found_by_blocks(tmp_path, expected):
    store = PartialStore(str(tmp_path / "analysis"))
    assert run_pass(MatrixSum(), PARTS, partials=store, block=4) == expected
    assert len(list(tmp_path.rglob("*.partial"))) == 3
    again = logged(tmp_path / "again")
    assert run_pass(again, PARTS, partials=store, block=4, runner=RunnerChoice("threads", 2)) == expected
    assert again.mapped() == []


def test_another_pass_does_not_take_them(tmp_path, expected):
    store = PartialStore(str(tmp_path / "analysis"))
    run_pass(MatrixSum(), PARTS, partials=store)
    for other in ({"version": 2}, {"settings": {"drop": "first"}}, {"name": "other"}):
        a_pass = logged(tmp_path / str(other), **other)
        assert run_pass(a_pass, PARTS, partials=store) == expected
        assert a_pass.mapped() == PARTS


def test_damaged_partials_are_computed_again(tmp_path, expected, caplog):
    store = PartialStore(str(tmp_path / "analysis"))
    run_pass(MatrixSum(), PARTS, partials=store)
    paths = sorted(tmp_path.rglob("*.partial"))
    whole = [path.read_bytes() for path in paths]
    rng = random.Random(0)
    for path, data in zip(paths, whole, strict=True):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(rng.choice([bytes(flipped), data[:-1], b"", data[: len(data) // 2]]))
    again = logged(tmp_path / "again")
    assert run_pass(again, PARTS, partials=store) == expected
    assert again.mapped() == PARTS
    assert [path.read_bytes() for path in paths] == whole
    assert caplog.text.count("is damaged") == len(PARTS)


def test_a_flipped_byte_anywhere_in_a_partial_is_found(tmp_path):
    store, small = PartialStore(str(tmp_path / "analysis")), MatrixSum(width=2)
    expected = run_pass(small, [0], partials=store)
    (path,) = tmp_path.rglob("*.partial")
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        # Where a byte of its name was flipped, it is another pass's.
        with contextlib.suppress(RunError):
            assert run_pass(small, [0], partials=store) == expected
        path.unlink(missing_ok=True)


def test_a_partial_under_a_foreign_name_is_refused(tmp_path):
    store = PartialStore(str(tmp_path / "analysis"))
    run_pass(MatrixSum(), PARTS[:2], partials=store)
    first, second = sorted(tmp_path.rglob("*.partial"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(RunError, match=r"is the partial of another pass \(parts differ\): remove it"):
        run_pass(MatrixSum(), PARTS[:2], partials=store)


def test_a_folder_that_cannot_be_written_or_read_is_one_line_that_names_the_flag(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot be read: Not a directory; or choose another .*--partials FOLDER"):
        run_pass(MatrixSum(width=2), PARTS, partials=PartialStore(str(tmp_path / "file")))

    def full(store, name, data):
        raise RunError("disk full: free some space")

    monkeypatch.setattr("core.object_store.LocalStore.create_bytes", full)
    with pytest.raises(RunError, match=r"disk full: free some space; or choose another .*--partials FOLDER, or none"):
        run_pass(MatrixSum(width=2), PARTS, partials=PartialStore(str(tmp_path / "analysis")))


class OtherHardware(MatrixSum):
    """Its last bits differ."""

    def map(self, part):
        return super().map(part) * (1 + 1e-6)


def test_of_two_writers_the_first_counts_for_both(tmp_path, expected):
    """The second one computed a partial, too, before it saw the first one's."""
    store = PartialStore(str(tmp_path / "analysis"))

    class Late(OtherHardware):
        def map(self, part):
            run_pass(MatrixSum(), [part], partials=store)
            return super().map(part)

    assert run_pass(Late(), PARTS, partials=store) == expected


def test_removing_leaves_nothing_of_the_pass_and_the_partials_of_others(tmp_path):
    store = PartialStore(str(tmp_path / "analysis"))
    run_pass(MatrixSum(), PARTS, partials=store)
    run_pass(MatrixSum(version=2), PARTS[:1], partials=store)
    store.remove(MatrixSum())
    assert len(list(tmp_path.rglob("*.partial"))) == 1
    store.remove(MatrixSum(version=2))
    assert list(tmp_path.iterdir()) == []


def test_partials_in_a_bucket_behind_a_url(expected):
    store = PartialStore("memory://partials-test/analysis")
    assert run_pass(MatrixSum(), PARTS, partials=store, block=2) == expected
    assert run_pass(MatrixSum(bad=3), PARTS, partials=store, block=2) == expected
    store.remove(MatrixSum())


@pytest.mark.parametrize("seed", range(30 if os.environ.get("FAULTS") == "all" else 3))
def test_killed_at_random_moments_and_finished_gives_the_same_bytes(forks, tmp_path, expected, seed):
    rng = random.Random(seed)
    name = rng.choice(["local", "threads"])
    (tmp_path / "log").mkdir()
    wish = {
        "parts": len(PARTS),
        "log": str(tmp_path / "log"),
        "partials": str(tmp_path / "analysis"),
        "runner": (name, 2 if name == "threads" else None),
        "block": rng.choice([1, 2]),
        "result": str(tmp_path / "result"),
    }
    for _ in range(3):
        fork = forks.start("light_passes:summed", wish)
        time.sleep(rng.uniform(0, 0.4))
        fork.kill()
        fork.wait(30)
    assert forks.start("light_passes:summed", wish).wait(60) == 0
    assert Path(wish["result"]).read_bytes() == expected


@pytest.fixture
def bucket(monkeypatch):
    from fake_gcs import FakeGcs, gcs_environment

    with FakeGcs() as server:
        for name, value in gcs_environment(server).items():
            monkeypatch.setenv(name, value)
        yield server


def test_partials_in_a_bucket_of_the_storage_service(bucket, tmp_path, expected):
    store = PartialStore("gs://bucket/out/analysis")
    with pytest.raises(RunError, match="part_7"):
        run_pass(MatrixSum(bad=7), PARTS, partials=store)
    again = logged(tmp_path / "again")
    assert run_pass(again, PARTS, partials=store) == expected
    assert again.mapped() == PARTS[7:]
    store.remove(MatrixSum())
    assert run_pass(again, PARTS, partials=store) == expected
    assert len(again.mapped()) == 4 + len(PARTS)


POOL = """
import sys
sys.path.insert(0, sys.argv[1])
from light_passes import MatrixSum
from analysis.passes import PartialStore, RunnerChoice, run_pass
if __name__ == "__main__":
    run_pass(MatrixSum(log=sys.argv[2], pause_s=0.2), range(200), partials=PartialStore(sys.argv[3]),
             runner=RunnerChoice("processes", 2))
"""


def test_processes_end_with_a_parent_that_is_killed_and_their_partials_count(tmp_path, expected):
    log, store = tmp_path / "log", PartialStore(str(tmp_path / "analysis"))
    log.mkdir()
    argv = [sys.executable, "-c", POOL, str(Path(__file__).parents[2]), str(log), store.url]
    parent = subprocess.Popen(argv, env=environment())
    while len(list(tmp_path.rglob("*.partial"))) < 4:
        assert parent.poll() is None
        time.sleep(0.05)
    workers = {int(path.name.split("-")[1]) for path in log.iterdir()}
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers):
        assert time.monotonic() < deadline, workers
        time.sleep(0.05)
    again = logged(tmp_path / "again")
    assert run_pass(again, PARTS, partials=store) == expected
    assert len(again.mapped()) <= len(PARTS) - 4
