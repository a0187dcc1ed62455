"""Streams: JSON Lines files of samples, read in flat memory.

A line's position, counted from 0, identifies it: it is the same for every worker, selection and resume.

The folder of a dataset shard (see `core.streams.sharded_dataset`) is a stream, too: its positions count from the start
of the whole dataset.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from core.base.errors import RunError, UsageError
from core.object_store.stored_files import filesystem, is_file, read_jsonl_lines, storage_errors, stored_info
from core.streams.lines import Kind, kind_of, parse_json_line, parse_object
from core.streams.sharded_dataset import SHARD_FILE, DatasetShard, check_chunk, find_shard, is_dataset

_NUMBERED_STREAM = re.compile(r"(.*stream_)([0-9]+)(\.jsonl(?:\.gz|\.zst)?)")


@dataclass(frozen=True)
class StreamRecord:
    """One well-formed line.

    `payload` is the task dict for "arc" (always with `train` and `test`), the text, the list of messages or the list of
    token ids.
    """

    position: int
    """Position in the stream, from 0; for a dataset shard: in the whole dataset."""
    line: int
    """Line number in the file (for a dataset shard: in the chunk), from 1."""
    kind: Kind
    payload: Any
    task_id: str | None
    labels: dict[str, Any]


@dataclass(frozen=True)
class BadRecord:
    """One line that is not a sample, and why."""

    position: int
    line: int
    reason: str


def read_stream(
    path: str,
    *,
    machine_id: int = 0,
    total_machines: int = 1,
    max_tasks: int | None = None,
    start_position: int = 0,
) -> Iterator[StreamRecord | BadRecord]:
    """The lines of a stream that belong to this machine, in order, from `start_position` on.

    `path` is a file or the folder of a dataset shard. A line belongs to the machine when
    `position % total_machines == machine_id`. `max_tasks` limits the lines of the machine; bad ones and those before
    `start_position` count, so that a resumed read ends where an uninterrupted one does. Lines that are not yielded are
    not parsed once the stream's kind is known: the first line that has a kind decides it, and a line of another kind
    is a bad record. Blank lines at the end are ignored.

    Raises UsageError for a missing file or an invalid selection, and RunError, while reading, for an empty stream or a
    damaged .gz or .zst.
    """
    if total_machines < 1 or not 0 <= machine_id < total_machines:
        raise UsageError(f"machine_id {machine_id}: must lie in 0..{total_machines - 1}, for {total_machines} machines")
    if max_tasks is not None and max_tasks < 1:
        raise UsageError(f"max_tasks {max_tasks}: must be at least 1")
    return _read_selected(resolve_stream_path(path), machine_id, total_machines, max_tasks, start_position)


def _read_selected(
    path: str, machine_id: int, total_machines: int, max_tasks: int | None, start_position: int
) -> Iterator[StreamRecord | BadRecord]:
    shard = find_shard(path)
    first = first_selected(shard.first_task if shard else 0, machine_id, total_machines)
    end = None if max_tasks is None else first + max_tasks * total_machines
    kind: Kind | None = None
    position = -1
    for position, line, raw in _numbered_lines(path, shard):
        if end is not None and position >= end:
            return
        selected = position >= start_position and position % total_machines == machine_id
        if not selected and kind is not None:
            continue
        record = _parse_line(raw, position, line, kind)
        kind = kind or _kind_of_line(raw, record)
        if selected:
            yield record
    if position < 0:
        raise RunError(f"{path}: the stream is empty: a stream has one JSON object per line")


def first_selected(first_position: int, machine_id: int, total_machines: int) -> int:
    """The first position from `first_position` on that belongs to the machine."""
    return first_position + (machine_id - first_position) % total_machines


def survey_records(
    path: str, machine_id: int, total_machines: int, max_tasks: int | None, *, wanted: int
) -> tuple[int, list[StreamRecord | BadRecord]]:
    """The number of records that `read_stream` yields, and `wanted` to 2 * `wanted` of them, evenly spread."""
    shard = find_shard(path)
    first = first_selected(shard.first_task if shard else 0, machine_id, total_machines)
    count, stride = 0, 1
    kept: list[tuple[int, int, bytes]] = []
    kind: Kind | None = None
    for position, line, raw in _numbered_lines(path, shard):
        kind = kind or _kind_of_line(raw, _parse_line(raw, position, line, None))
        if position < first or (position - first) % total_machines:
            continue
        if count == max_tasks:
            break
        if count % stride == 0:
            kept.append((position, line, raw))
        count += 1
        if len(kept) >= 2 * wanted:
            kept, stride = kept[::2], 2 * stride
    return count, [_parse_line(raw, position, line, kind) for position, line, raw in kept]


def _numbered_lines(path: str, shard: DatasetShard | None) -> Iterator[tuple[int, int, bytes]]:
    """Position, line number in its file, and bytes of each line."""
    if shard is None:
        for position, raw in enumerate(read_jsonl_lines(path)):
            yield position, position + 1, raw
        return
    position = shard.first_task
    for chunk in shard.chunks:
        check_chunk(path, chunk)
        line = 0
        for line, raw in enumerate(read_jsonl_lines(f"{path}/{chunk.name}"), 1):
            if line <= chunk.num_tasks:
                yield position, line, raw
                position += 1
        if line != chunk.num_tasks:
            raise RunError(
                f"{path}/{chunk.name} has {line} lines, {SHARD_FILE} lists {chunk.num_tasks}: make the dataset again"
            )


def _parse_line(raw: bytes, position: int, line: int, stream_kind: Kind | None) -> StreamRecord | BadRecord:
    try:
        content = parse_object(parse_json_line(raw))
        if stream_kind not in (None, content.kind):
            raise ValueError(f"{content.kind} line in a stream of {stream_kind} lines")
        return StreamRecord(position, line, *content)
    except ValueError as error:
        return BadRecord(position, line, str(error))


def _kind_of_line(raw: bytes, record: StreamRecord | BadRecord) -> Kind | None:
    """The kind of a line, by its keys where it is bad: one bad grid must not change the kind of its stream."""
    if isinstance(record, StreamRecord):
        return record.kind
    try:
        return kind_of(parse_json_line(raw))
    except ValueError:
        return None


def samples_per_record(kind: Kind, predictions: int) -> int:
    """The number of samples of one line: an ARC task is augmented `predictions` times, other lines make one sample."""
    return predictions if kind == "arc" else 1


def sample_index(record: StreamRecord, prediction: int, predictions: int) -> int:
    """The `sample_idx` of one sample: its index in the stream, counting the samples that bad lines would have made.

    Raises ValueError if the record has no such prediction.
    """
    count = samples_per_record(record.kind, predictions)
    if not 0 <= prediction < count:
        raise ValueError(f"prediction {prediction} of a record that makes {count} samples")
    return record.position * count + prediction


def format_bad(path: str, bad: BadRecord) -> str:
    """`file:line: reason`, as compilers write it; the file is the chunk when the stream is a dataset shard."""
    shard = find_shard(path)
    file = f"{path}/{shard.chunk_at(bad.position).name}" if shard else path
    return f"{file}:{bad.line}: {bad.reason}"


def resolve_stream_path(path: str) -> str:
    """The path itself, or its other spelling (`stream_0.jsonl`, `stream_000.jsonl`) if only that exists.

    Raises UsageError if neither is a file nor the folder of a dataset shard.
    """
    with storage_errors(f"{path}: cannot look for the stream"):
        for spelling in [path, *_other_spellings(path)]:
            if is_file(spelling):
                return spelling
        if find_shard(path) is not None:
            return path.rstrip("/")
        fs, location = filesystem(path)
        if not fs.isdir(location):
            raise UsageError(f"{path}: no such file")
        advice = ": pass --use_sharded_dataset --sharded_dataset_dir" if is_dataset(path) else ""
        raise UsageError(f"{path} is a folder, not a stream{advice}")


def _other_spellings(path: str) -> list[str]:
    numbered = _NUMBERED_STREAM.fullmatch(path)
    if numbered is None:
        return []
    start, digits, end = numbered.groups()
    spellings = (f"{start}{int(digits):03d}{end}", f"{start}{int(digits)}{end}")
    return [spelling for spelling in spellings if spelling != path]


def stream_identity(path: str) -> dict[str, Any]:
    """`name`, `bytes` and `crc32c` (8 hex digits) of the stored file: the same for a local and a remote copy.

    A bucket stores the checksum, and a dataset shard's metadata those of its chunks; other files are read.
    """
    path = resolve_stream_path(path)
    with storage_errors(f"{path}: cannot read"):
        shard = find_shard(path)
        if shard is not None:
            return shard.identity
        info = stored_info(path)
    return {"name": _without_query(path).rsplit("/", 1)[-1], "bytes": info.size, "crc32c": info.crc32c}


def _without_query(path: str) -> str:
    """A URL without its query, which may sign the request; a local path as it is."""
    return path.partition("?")[0] if "://" in path else path
