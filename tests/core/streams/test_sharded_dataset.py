"""Sharded datasets: nothing is lost to a remainder, nothing is read that is not what was written."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import google_crc32c
import pytest
from fake_gcs import FakeGcs, gcs_environment
from hypothesis import given, settings
from hypothesis import strategies as st

from core.base.errors import RunError, UsageError
from core.dataset_utils import (
    BadRecord,
    format_bad,
    read_stream,
    resolve_stream_path,
    stream_identity,
    survey_records,
)
from core.object_store import LocalStore
from core.streams.sharded_dataset import find_shard, read_dataset, shard_sizes, write_dataset
from core.streams.writing import StreamOptions, create_sharded_dataset

ROOT = Path(__file__).parents[3]


def source(folder: Path, count: int, length: int = 0) -> Path:
    path = folder / "source.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"sample {i} " + "x" * (i % (length + 1))}) + "\n" for i in range(count))
    )
    return path


def make(folder: Path, count: int, num_shards: int, chunk_bytes: int = 1 << 20, **options):
    lines = source(folder, count, length=30)
    return write_dataset(
        lines, count, str(folder / "data"), num_shards=num_shards, chunk_size_mb=chunk_bytes / 2**20, **options
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@given(count=st.integers(1, 60), num_shards=st.integers(1, 12), chunk_bytes=st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_every_task_is_in_exactly_one_shard_at_its_own_position(tmp_path_factory, count, num_shards, chunk_bytes):
    folder = tmp_path_factory.mktemp("d")
    num_shards = min(count, num_shards)
    manifest = make(folder, count, num_shards, chunk_bytes)
    assert read_dataset(str(folder / "data")) == manifest
    records = [record for shard in manifest.shards for record in read_stream(str(folder / "data" / shard.name))]
    assert [record.position for record in records] == list(range(count))
    assert [record.payload.split()[1] for record in records] == [str(i) for i in range(count)]
    sizes = [shard.num_tasks for shard in manifest.shards]
    assert max(sizes) - min(sizes) <= 1
    for shard in manifest.shards:
        for chunk in shard.chunks:
            data = (folder / "data" / shard.name / chunk.name).read_bytes()
            assert (chunk.bytes, chunk.crc32c) == (len(data), f"{google_crc32c.value(data):08x}")
            assert chunk.bytes <= chunk_bytes or chunk.num_tasks == 1
            assert chunk.num_tasks == data.count(b"\n")


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_shard_sizes_differ_by_one_at_most_and_lose_nothing(total, num_shards):
    sizes = shard_sizes(total, num_shards)
    assert (sum(sizes), len(sizes)) == (total, num_shards)
    assert max(sizes) - min(sizes) <= 1


def test_the_layout_is_the_described_one(tmp_path):
    make(tmp_path, 7, 2, chunk_bytes=60)
    master = json.loads((tmp_path / "data/master_metadata.json").read_text())
    assert set(master) == {"total_tasks", "num_shards", "chunk_size_mb", "shards"}
    assert (master["total_tasks"], master["num_shards"]) == (7, 2)
    first, second = master["shards"]
    assert set(first) == {"shard_id", "name", "num_tasks", "first_task", "chunks"}
    assert (second["shard_id"], second["name"], second["num_tasks"], second["first_task"]) == (1, "shard_001", 3, 4)
    assert set(first["chunks"][0]) == {"name", "num_tasks", "bytes", "crc32c"}
    assert json.loads((tmp_path / "data/shard_001/metadata.json").read_text()) == second
    assert (tmp_path / "data/shard_000/chunk_0000.jsonl").is_file()


@given(start=st.integers(0, 45), total=st.integers(1, 5), limit=st.none() | st.integers(1, 9), few=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_machines_and_resumes_select_by_position_in_the_dataset(tmp_path_factory, start, total, limit, few):
    folder = tmp_path_factory.mktemp("d")
    make(folder, 40, 3, 100)
    for shard in read_dataset(str(folder / "data")).shards:
        path = str(folder / "data" / shard.name)
        for machine in range(total):
            held = range(shard.first_task, shard.first_task + shard.num_tasks)
            wanted = [position for position in held if position % total == machine][:limit]
            read = read_stream(path, machine_id=machine, total_machines=total, max_tasks=limit, start_position=start)
            assert [record.position for record in read] == [position for position in wanted if position >= start]
            count, surveyed = survey_records(path, machine, total, limit, wanted=few)
            places = [wanted.index(record.position) for record in surveyed]
            assert count == len(wanted)
            assert min(few, count) <= len(places) < 2 * few
            assert places == list(range(0, count, places[1] - places[0] if len(places) > 1 else max(count, 1)))


def test_a_bad_line_is_named_by_its_chunk_and_its_line_there(tmp_path):
    lines = [{"text": "a"}, {"text": "b"}, {"texts": "c"}, {"text": "d"}]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_dataset(tmp_path / "s.jsonl", 4, str(tmp_path / "data"), num_shards=1, chunk_size_mb=30 / 2**20)
    path = str(tmp_path / "data/shard_000")
    (bad,) = (record for record in read_stream(path) if isinstance(record, BadRecord))
    assert (bad.position, bad.line) == (2, 1)
    assert format_bad(path, bad).startswith(f"{path}/chunk_0001.jsonl:1: no sample: ")


def test_compressed_chunks_are_read(tmp_path):
    make(tmp_path, 3, 1)
    folder = tmp_path / "data/shard_000"
    data = gzip.compress((folder / "chunk_0000.jsonl").read_bytes())
    (folder / "chunk_0000.jsonl").unlink()
    (folder / "chunk_0000.jsonl.gz").write_bytes(data)
    entry = json.loads((folder / "metadata.json").read_text())
    entry["chunks"] = [
        {
            "name": "chunk_0000.jsonl.gz",
            "num_tasks": 3,
            "bytes": len(data),
            "crc32c": f"{google_crc32c.value(data):08x}",
        }
    ]
    (folder / "metadata.json").write_text(json.dumps(entry))
    assert [record.position for record in read_stream(str(folder))] == [0, 1, 2]


def test_a_changed_chunk_is_refused_before_its_first_line(tmp_path):
    make(tmp_path, 6, 1, chunk_bytes=100)
    path = tmp_path / "data/shard_000/chunk_0001.jsonl"
    whole = path.read_bytes()
    for damaged in (whole.replace(b"sample", b"simple", 1), whole[:-1], b""):
        path.write_bytes(damaged)
        reader = read_stream(str(path.parent))
        with pytest.raises(RunError, match=r"chunk_0001\.jsonl has .* was changed"):
            list(reader)
    path.unlink()
    with pytest.raises(RunError, match=r"chunk_0001\.jsonl: no such file"):
        list(read_stream(str(path.parent)))


def test_a_chunk_with_other_lines_than_its_metadata_says_is_refused(tmp_path):
    make(tmp_path, 6, 1)
    metadata = tmp_path / "data/shard_000/metadata.json"
    for count in (5, 7):
        entry = json.loads(metadata.read_text())
        entry["num_tasks"] = entry["chunks"][0]["num_tasks"] = count
        metadata.write_text(json.dumps(entry))
        with pytest.raises(RunError, match=f"has 6 lines, metadata.json lists {count}"):
            list(read_stream(str(metadata.parent)))


MANIFESTS = {
    "a path as shard": (lambda m: m["shards"][0].update(name="../shard_000"), "'../shard_000' is not the name"),
    "a path as chunk": (
        lambda m: m["shards"][0]["chunks"][0].update(name="../../x.jsonl"),
        "is not the name of a chunk",
    ),
    "an absolute chunk": (
        lambda m: m["shards"][0]["chunks"][0].update(name="/etc/passwd"),
        "is not the name of a chunk",
    ),
    "a line feed": (lambda m: m["shards"][0]["chunks"][0].update(name="chunk_0000.jsonl\n"), "is not the name"),
    "another number": (lambda m: m["shards"][1].update(name="shard_000"), "'shard_000' is not the name of shard 1"),
    "more shards than memory": (lambda m: m.update(num_shards=10**15), "not numbered 0 to 999999999999999"),
    "a size beyond floats": (lambda m: m.update(chunk_size_mb=10**400), "too large"),
    "a lost shard": (lambda m: m["shards"].pop(), "not numbered 0 to 1"),
    "a gap": (lambda m: m["shards"][1].update(first_task=5), "shard_001 begins at task 5"),
    "a wrong total": (lambda m: m.update(total_tasks=8), "total_tasks is 8, its shards have 7"),
    "a wrong sum": (lambda m: m["shards"][1].update(num_tasks=2), "shard_001 has 2 tasks, its chunks have 3"),
    "a truth for a number": (lambda m: m["shards"][1].update(num_tasks=True), "'num_tasks' is missing or of the wrong"),
    "a negative number": (lambda m: m["shards"][0].update(first_task=-1), "'first_task' is negative"),
    "no chunks": (lambda m: m["shards"][0].pop("chunks"), "'chunks' is missing"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_does_not_hold_together_is_refused(tmp_path, case):
    make(tmp_path, 7, 2)
    path = tmp_path / "data/master_metadata.json"
    change, reason = MANIFESTS[case]
    master = json.loads(path.read_text())
    change(master)
    path.write_text(json.dumps(master))
    with pytest.raises(RunError) as error:
        read_dataset(str(tmp_path / "data"))
    assert str(path) in str(error.value)
    assert reason in str(error.value)


def test_a_manifest_that_is_no_json_is_refused(tmp_path):
    make(tmp_path, 7, 2)
    for data in (b"", b"{", b"[]", b"\xff", b"[" * 100_000):
        (tmp_path / "data/master_metadata.json").write_bytes(data)
        with pytest.raises(RunError, match="not the metadata of a sharded dataset"):
            read_dataset(str(tmp_path / "data"))


def test_a_shard_is_a_stream_wherever_it_lies(tmp_path):
    make(tmp_path, 7, 2)
    path = str(tmp_path / "data/shard_001")
    assert resolve_stream_path(path + "/") == path
    identity = stream_identity(path)
    assert identity["name"] == "shard_001"
    assert identity["bytes"] == sum(file.stat().st_size for file in (tmp_path / "data/shard_001").glob("chunk_*"))
    moved = tmp_path / "elsewhere"
    (tmp_path / "data").rename(moved)
    assert stream_identity(str(moved / "shard_001")) == identity
    assert stream_identity(str(moved / "shard_000"))["crc32c"] != identity["crc32c"]
    (moved / "shard_001").rename(moved / "shard_007")
    with pytest.raises(RunError, match="describes shard_001"):
        find_shard(str(moved / "shard_007"))


def test_the_dataset_itself_is_no_stream_and_says_which_flags_take_it(tmp_path):
    make(tmp_path, 7, 2)
    with pytest.raises(UsageError, match="--use_sharded_dataset"):
        resolve_stream_path(str(tmp_path / "data"))
    (tmp_path / "shard_005").mkdir()
    with pytest.raises(UsageError, match="is a folder, not a stream"):
        resolve_stream_path(str(tmp_path / "shard_005"))


class DiesAfter(LocalStore):
    """The disk of a process that is killed before its n-th creation."""

    left = 0

    def create_bytes(self, name, data):
        if DiesAfter.left == 0:
            raise KeyboardInterrupt
        DiesAfter.left -= 1
        return super().create_bytes(name, data)


@pytest.mark.parametrize("survived", range(4))
def test_a_dataset_is_complete_or_not_there_and_a_second_try_completes_it(tmp_path, monkeypatch, survived):
    make(tmp_path, 7, 3, 60)
    whole = files(tmp_path / "data")
    (tmp_path / "data").rename(tmp_path / "whole")
    monkeypatch.setattr("core.streams.sharded_dataset.open_store", DiesAfter)
    DiesAfter.left = survived
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, 7, 3, 60)
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"no master_metadata\.json"):
        read_dataset(str(tmp_path / "data"))
    make(tmp_path, 7, 3, 60)
    assert files(tmp_path / "data") == whole
    assert [path.name for path in tmp_path.glob("source*")] == ["source.jsonl"]


def test_another_dataset_is_never_overwritten_unless_asked(tmp_path):
    make(tmp_path, 7, 3, 60)
    whole = files(tmp_path / "data")
    make(tmp_path, 7, 3, 60)
    assert files(tmp_path / "data") == whole
    for count, num_shards in ((8, 3), (7, 2)):
        with pytest.raises(UsageError, match="another dataset is already there: pass --overwrite"):
            make(tmp_path, count, num_shards, 60)
        assert files(tmp_path / "data") == whole
    (tmp_path / "data/notes.txt").write_text("mine")
    make(tmp_path, 7, 2, 60, overwrite=True)
    assert {name.split("/")[0] for name in files(tmp_path / "data")} == {
        *("master_metadata.json", "shard_000", "shard_001", "notes.txt")
    }
    assert read_dataset(str(tmp_path / "data")).num_shards == 2


def test_while_a_damaged_dataset_is_replaced_it_is_not_there(tmp_path, monkeypatch):
    make(tmp_path, 7, 2)
    (tmp_path / "data/shard_001/chunk_0000.jsonl").write_bytes(b"damaged")
    monkeypatch.setattr("core.streams.sharded_dataset.open_store", DiesAfter)
    DiesAfter.left = 0
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, 7, 2, overwrite=True)
    monkeypatch.undo()
    assert not (tmp_path / "data/master_metadata.json").exists()


def test_what_cannot_be_cut_is_refused_and_leaves_nothing(tmp_path):
    lines = source(tmp_path, 3)
    options = {"dataset_name": str(lines), "output_dir": str(tmp_path / "data")}
    with pytest.raises(UsageError, match="3 samples cannot fill 4 shards: pass --num_shards 3"):
        create_sharded_dataset(StreamOptions(**options, num_shards=4))
    for flag in ({"num_shards": 0}, {"chunk_size_mb": 0.0}, {"chunk_size_mb": float("nan")}):
        with pytest.raises(UsageError, match=next(iter(flag))):
            create_sharded_dataset(StreamOptions(**options, **flag))
    lines.write_text('{"text": "a"}\n{"no": 1}\n')
    with pytest.raises(RunError, match=r"source\.jsonl:2: "):
        create_sharded_dataset(StreamOptions(**options, num_shards=1))
    assert not (tmp_path / "data").exists()


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(ROOT / "create_dataset_streams.py"), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=120, env=os.environ | environment)


def test_the_command_makes_the_same_dataset_locally_and_in_a_bucket(tmp_path):
    lines = source(tmp_path, 11)
    flags = ("--dataset_name", lines, "--sharded", "--num_shards", 3, "--chunk_size_mb", 0.0001)
    local = command(*flags, "--output_dir", tmp_path / "data", "--json")
    assert local.returncode == 0, local.stderr
    assert "11 text samples in 3 shards" in local.stderr
    assert [stream["samples"] for stream in json.loads(local.stdout)["streams"]] == [4, 4, 3]
    with FakeGcs() as server:
        remote = command(*flags, "--output_dir", "gs://bucket/data", **gcs_environment(server))
        assert remote.returncode == 0, remote.stderr
        stored = {name.removeprefix("data/"): data for name, data in server.objects().items()}
    assert stored == files(tmp_path / "data")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--sharded",), "--sharded needs --num_shards"),
        (("--sharded", "--num_shards", 2, "--num_streams", 2), "--num_streams cannot be used with --sharded"),
        (("--num_shards", 2), "--num_shards cannot be used without --sharded"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, flags, reason):
    done = command("--dataset_name", source(tmp_path, 3), "--output_dir", tmp_path / "data", *flags)
    assert done.returncode == 2
    assert f"error: {reason}" in done.stderr
