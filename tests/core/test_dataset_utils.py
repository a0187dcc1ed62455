import gzip
import json
import random
import tracemalloc
from pathlib import Path

import fsspec
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from core.base.errors import RunError, UsageError
from core.dataset_utils import (
    BadRecord,
    StreamRecord,
    format_bad,
    read_stream,
    resolve_stream_path,
    sample_index,
    samples_per_record,
    stream_identity,
)
from core.streams.lines import parse_object

NO_SAMPLE = "no sample: expected 'train' and 'test', 'examples', 'text', 'messages' or 'input_ids', found"
TOO_FEW = "[input, output] pairs: a task needs at least 2, of which the last is the test"
TASK = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]]}]}
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def write(path, lines, ending=""):
    data = b"".join(
        (line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode()) + b"\n" for line in lines
    )
    path = Path(f"{path}{ending}")
    path.write_bytes(PACK[ending](data))
    return str(path)


def texts(count):
    return [{"text": f"sample {index}"} for index in range(count)]


@pytest.mark.parametrize("ending", PACK)
def test_plain_gzip_and_zstandard_streams_read_the_same(tmp_path, ending):
    path = write(tmp_path / "stream_0.jsonl", texts(5), ending)
    assert list(read_stream(path)) == [
        StreamRecord(index, index + 1, "text", f"sample {index}", None, {}) for index in range(5)
    ]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_files_of_several_compressed_parts_are_read_to_the_end(tmp_path, ending):
    parts = [json.dumps(line).encode() + b"\n" for line in texts(3)]
    path = tmp_path / f"s.jsonl{ending}"
    path.write_bytes(b"".join(map(PACK[ending], [*parts[:2], b"", parts[2]])))
    assert [record.payload for record in read_stream(str(path))] == ["sample 0", "sample 1", "sample 2"]


@pytest.mark.parametrize(
    ("line", "kind", "payload"),
    [
        (TASK, "arc", TASK),
        (
            {"examples": [[[[1]], [[2]]], [[[3]], [[4]]]]},
            "arc",
            {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]], "output": [[4]]}]},
        ),
        ({"text": "héllo"}, "text", "héllo"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages", [{"role": "user", "content": "hi"}]),
        ({"input_ids": [0, 5]}, "input_ids", [0, 5]),
    ],
)
def test_a_line_is_told_by_its_keys_and_other_keys_are_labels(tmp_path, line, kind, payload):
    labels = {"meta": {"set": "Wiki", "tags": [1, None]}, "score": 0.5}
    path = write(tmp_path / "s.jsonl", [{"task_id": "a", **line, **labels}])
    assert list(read_stream(path)) == [StreamRecord(0, 1, kind, payload, "a", labels)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "broken JSON: Expecting property name enclosed in double quotes at column 2"),
        (b'"text"', "a line is a JSON object, not a text"),
        (b"[1]", "a line is a JSON object, not a list"),
        (b"null", "a line is a JSON object, not null"),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff at column 11"),
        (b'{"text": "\\ud800"}', "a text holds half of a surrogate pair, which no encoding can write"),
        (b'{"text": "a", "score": NaN}', "broken JSON: NaN is not a JSON value"),
        (b'{"text": "a", "score": 1e999}', "the number 1e999 is too large"),
        (b"[" * 100_000, "JSON nested too deeply"),
        (b"", "blank line: remove it, or make it a sample"),
        (b" \t\r", "blank line: remove it, or make it a sample"),
        ({"txt": "a"}, f"{NO_SAMPLE} 'txt'"),
        ({}, f"{NO_SAMPLE} no keys"),
        ({"text": "a", "input_ids": [1]}, "the keys 'text' and 'input_ids' name more than one sample"),
        ({**TASK, "examples": []}, "the keys 'train' and 'examples' name more than one sample"),
        ({"text": 3}, "'text' is a text, not a number"),
        ({"text": None}, "'text' is a text, not null"),
        ({"text": ""}, "'text' is empty"),
        ({"text": "a", "task_id": ["x"]}, 'task_id is a non-empty text or a whole number, not ["x"]'),
        ({"text": "a", "task_id": ""}, 'task_id is a non-empty text or a whole number, not ""'),
        ({"train": TASK["train"]}, "the task has no 'test'"),
        ({"test": TASK["test"]}, "the task has no 'train'"),
        ({**TASK, "train": []}, "the task has no train pairs"),
        ({**TASK, "test": [{"input": [[1], []]}]}, "test[0].input row 1 is not a non-empty list of integers"),
        ({"examples": [[[[1]], [[2]]]]}, f"1 {TOO_FEW}"),
        ({"examples": []}, f"0 {TOO_FEW}"),
        ({"examples": [[[[1]]], [[[1]]]]}, "pair 0 is not an [input, output] pair"),
        ({"examples": 5}, "'examples' is a list of [input, output] pairs, not a number"),
        ({"messages": []}, "'messages' is a non-empty list of objects with 'role' and 'content'"),
        ({"messages": ["hi"]}, "messages[0] is an object with 'role' and 'content', not a text"),
        ({"messages": [{"role": "user"}]}, "messages[0] needs a text as its 'content'"),
        ({"input_ids": []}, "'input_ids' is a non-empty list of token ids"),
        ({"input_ids": [1, True]}, "'input_ids' holds true: token ids are whole numbers"),
        ({"input_ids": [1.5]}, "'input_ids' holds 1.5: token ids are whole numbers"),
        ({"input_ids": [-1]}, "'input_ids' holds a number outside 0..2147483647"),
    ],
)  # fmt: skip
def test_a_bad_line_is_reported_with_its_place_and_the_next_is_read(tmp_path, line, reason):
    good = {"text": "a"} if not isinstance(line, dict) or "text" in line else line
    first, last = ({"text": "a"}, {"text": "b"}) if good == {"text": "a"} else ({"text": "x"}, {"text": "y"})
    path = write(tmp_path / "s.jsonl", [first, line, last])
    records = list(read_stream(path))
    assert records[1] == BadRecord(1, 2, reason)
    assert format_bad(path, records[1]) == f"{path}:2: {reason}"
    assert [records[0].payload, records[2].payload] == [first["text"], last["text"]]


def test_blank_lines_at_the_end_are_no_lines(tmp_path):
    path = write(tmp_path / "s.jsonl", [*texts(2), b"", b"  \r", b""])
    assert [type(record) for record in read_stream(path)] == [StreamRecord] * 2


def test_a_line_without_line_feed_at_the_end_is_read(tmp_path):
    (tmp_path / "s.jsonl").write_bytes(b'{"text": "a"}\r\n{"text": "b"}')
    assert [record.payload for record in read_stream(str(tmp_path / "s.jsonl"))] == ["a", "b"]


def test_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "s.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert [record.payload for record in read_stream(str(tmp_path / "s.jsonl"))] == ["a"]


def test_a_line_of_another_kind_is_bad(tmp_path):
    path = write(tmp_path / "s.jsonl", [TASK, {"text": "a"}, TASK])
    assert list(read_stream(path))[1] == BadRecord(1, 2, "text line in a stream of arc lines")


def test_the_kind_is_that_of_the_first_line_even_if_its_value_is_bad(tmp_path):
    path = write(tmp_path / "s.jsonl", [b"{broken", {"train": [], "test": []}, {"text": "a"}, TASK])
    assert [getattr(record, "reason", "ok")[:12] for record in read_stream(path)] == [
        *("broken JSON:", "the task has", "text line in", "ok"),
    ]
    for start in range(4):
        assert list(read_stream(path, start_position=start)) == list(read_stream(path))[start:]


@given(
    lines=st.integers(1, 40),
    total=st.integers(1, 5),
    limit=st.none() | st.integers(1, 12),
    start=st.integers(0, 45),
    bad=st.sets(st.integers(0, 39)),
)
@settings(max_examples=150, deadline=None)
def test_machines_share_every_line_once_and_a_resume_goes_on(tmp_path_factory, lines, total, limit, start, bad):
    path = write(
        tmp_path_factory.mktemp("s") / "s.jsonl",
        [b"{" if index in bad else line for index, line in enumerate(texts(lines))],
    )
    shares = [
        list(read_stream(path, machine_id=machine, total_machines=total, max_tasks=limit)) for machine in range(total)
    ]
    wanted = [list(range(machine, lines, total))[:limit] for machine in range(total)]
    assert [[record.position for record in share] for share in shares] == wanted
    assert all(isinstance(record, BadRecord) == (record.position in bad) for share in shares for record in share)
    for machine, share in enumerate(shares):
        resumed = read_stream(path, machine_id=machine, total_machines=total, max_tasks=limit, start_position=start)
        assert list(resumed) == [record for record in share if record.position >= start]


def test_lines_that_are_not_yielded_are_not_parsed(tmp_path, monkeypatch):
    path = write(tmp_path / "s.jsonl", texts(30))
    parsed = []
    loads = json.loads
    monkeypatch.setattr("core.streams.lines.json.loads", lambda text, **how: parsed.append(text) or loads(text, **how))
    records = list(read_stream(path, machine_id=1, total_machines=10, start_position=5))
    assert [record.position for record in records] == [11, 21]
    assert [json.loads(text)["text"] for text in list(parsed)] == ["sample 0", "sample 11", "sample 21"]


def test_a_selection_that_cannot_be_is_a_usage_error_before_anything_is_read(tmp_path):
    path = write(tmp_path / "s.jsonl", texts(1))
    for selection in (
        {"machine_id": 2, "total_machines": 2},
        {"machine_id": -1},
        {"total_machines": 0},
        {"max_tasks": 0},
    ):
        with pytest.raises(UsageError):
            read_stream(path, **selection)


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("lines", [[], [b"", b" "]])
def test_an_empty_stream_is_an_error(tmp_path, ending, lines):
    path = write(tmp_path / "s.jsonl", lines, ending)
    with pytest.raises(RunError, match="stream is empty"):
        list(read_stream(path))


def test_a_missing_file_is_a_usage_error_at_once(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read_stream(str(tmp_path / "stream_0.jsonl"))
    with pytest.raises(UsageError, match="is a folder"):
        read_stream(str(tmp_path))
    with pytest.raises(UsageError, match="nosuch"):
        read_stream("nosuch://bucket/stream_0.jsonl")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flip", "not compressed"])
def test_a_damaged_stream_names_the_file_and_the_line(tmp_path, ending, damage):
    words = random.Random(0)
    path = write(tmp_path / "s.jsonl", [{"text": f"{words.random()}"} for _ in range(20_000)], ending)
    data = bytearray(Path(path).read_bytes())
    if damage == "cut":
        del data[-5:]
    elif damage == "flip":
        data[len(data) // 2] ^= 0xFF
    else:
        data = bytearray(b'{"text": "a"}\n')
    Path(path).write_bytes(data)
    with pytest.raises(RunError) as failure:
        list(read_stream(path))
    assert str(failure.value).startswith(f"{path}: damaged or cut off after line ")


@pytest.mark.parametrize("ending", PACK)
def test_reading_needs_no_more_memory_for_a_longer_stream(tmp_path, ending):
    words = random.Random(0)

    def peak(count):
        path = write(tmp_path / f"{count}.jsonl", ({"text": words.randbytes(500).hex()} for _ in range(count)), ending)
        tracemalloc.start()
        read = sum(1 for _ in read_stream(path))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert read == count
        return most

    # The longer stream has 7 MB more; other threads of this process allocate a few KB meanwhile.
    assert peak(10_000) < 1.1 * peak(3_000) + 50_000


@pytest.mark.parametrize("ending", PACK)
def test_an_overlong_line_is_read_whole(tmp_path, ending):
    path = write(tmp_path / "s.jsonl", [{"text": "a"}, {"text": "xy" * 3_000_000}, {"text": "b"}], ending)
    assert [len(record.payload) for record in read_stream(path)] == [1, 6_000_000, 1]


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        ("stream_000.jsonl", "stream_0.jsonl"),
        ("stream_0.jsonl", "stream_000.jsonl"),
        ("stream_012.jsonl.gz", "stream_12.jsonl.gz"),
        ("stream_7.jsonl.zst", "stream_007.jsonl.zst"),
        ("stream_1000.jsonl", "stream_1000.jsonl"),
    ],
)
def test_both_spellings_of_a_stream_open_it(tmp_path, there, asked):
    (tmp_path / there).write_bytes(b"")
    assert resolve_stream_path(str(tmp_path / asked)) == str(tmp_path / there)


def test_the_spelling_asked_for_comes_first(tmp_path):
    for name in ("stream_0.jsonl", "stream_000.jsonl"):
        (tmp_path / name).write_bytes(b"")
    assert resolve_stream_path(str(tmp_path / "stream_0.jsonl")).endswith("stream_0.jsonl")


def test_another_number_is_not_another_spelling(tmp_path):
    (tmp_path / "stream_010.jsonl").write_bytes(b"")
    with pytest.raises(UsageError):
        resolve_stream_path(str(tmp_path / "stream_1.jsonl"))


def test_streams_are_read_through_urls():
    with fsspec.open("memory://bucket/stream_000.jsonl.zst", "wb") as file:
        file.write(PACK[".zst"](b'{"text": "a"}\n'))
    assert [record.payload for record in read_stream("memory://bucket/stream_0.jsonl.zst")] == ["a"]


def test_a_stream_has_the_same_identity_wherever_it_lies(tmp_path):
    # The check value of CRC-32C (RFC 3720) for the nine digits.
    (tmp_path / "stream_000.jsonl").write_bytes(b"123456789")
    with fsspec.open("memory://bucket/stream_000.jsonl", "wb") as file:
        file.write(b"123456789")
    expected = {"name": "stream_000.jsonl", "bytes": 9, "crc32c": "e3069283"}
    assert stream_identity(str(tmp_path / "stream_000.jsonl")) == expected
    assert stream_identity(str(tmp_path / "stream_0.jsonl")) == expected
    assert stream_identity("memory://bucket/stream_000.jsonl") == expected


class FailingFileSystem(MemoryFileSystem):
    """Fails as object stores do: with exceptions of its own."""

    protocol = "failing"

    def isfile(self, path):
        if "login" in path:
            raise Exception("Invalid credentials, 401")
        return True

    def _open(self, *args, **kwargs):
        raise Exception("Backend error, 503")


def test_faults_of_the_store_are_errors_of_the_run():
    fsspec.register_implementation("failing", FailingFileSystem, clobber=True)
    with pytest.raises(RunError, match=r"failing://login/s\.jsonl: cannot look for the stream: Invalid credentials"):
        read_stream("failing://login/s.jsonl")
    with pytest.raises(RunError, match=r"failing://b/s\.jsonl: cannot read on after line 0: Backend error"):
        list(read_stream("failing://b/s.jsonl"))


def test_tasks_count_once_a_prediction_and_other_samples_once():
    task = StreamRecord(3, 4, "arc", TASK, None, {})
    text = StreamRecord(3, 4, "text", "a", None, {})
    assert [samples_per_record(kind, 8) for kind in ("arc", "text", "messages", "input_ids")] == [8, 1, 1, 1]
    assert [sample_index(task, prediction, 8) for prediction in range(8)] == list(range(24, 32))
    assert sample_index(text, 0, 8) == 3
    for record, prediction in ((task, 8), (task, -1), (text, 1)):
        with pytest.raises(ValueError):
            sample_index(record, prediction, 8)


def test_a_whole_number_as_task_id_becomes_text():
    assert parse_object({"text": "a", "task_id": 7}).task_id == "7"
