"""Writes streams from a source: rows become checked lines, dealt to N files that appear together or not at all."""

import datetime
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.base.errors import RunError, UsageError
from core.object_store import LocalStore, ObjectInfo, ObjectStore, file_info, open_store, sync_folder
from core.object_store.stored_files import storage_errors
from core.streams.lines import Kind, kind_of, parse_object, task_from_pairs
from core.streams.options import DEFAULT_COLUMN, StreamOptions
from core.streams.sharded_dataset import check_not_taken, write_dataset
from core.streams.sources import SourceRow, read_source

_STREAM_NAME = re.compile(r"stream_[0-9]+\.jsonl(\.gz|\.zst)?")
_GENERATED_ID = re.compile(r"task_([0-9]{8,})")
_CONTENT_KEYS = ("train", "test", "examples", "text", "messages", "input_ids")


@dataclass(frozen=True)
class WrittenStream:
    """One stream in the output folder: a file, or the folder of a dataset shard."""

    path: str
    samples: int
    bytes: int
    crc32c: str


@dataclass(frozen=True)
class StreamsSummary:
    """What was written, left out and renamed."""

    kind: Kind
    samples: int
    streams: tuple[WrittenStream, ...]
    skipped_empty: int
    renamed_task_ids: int


class TaskIds:
    """Makes task ids unique.

    Ids generated from the row index take one byte each, so that a large source without ids needs little memory.
    """

    def __init__(self) -> None:
        self.renamed = 0
        self._used: set[str] = set()
        self._copies: dict[str, int] = {}
        self._is_generated = bytearray()

    def unique(self, wanted: str | None) -> str:
        """`wanted`, with a suffix if it is taken; `task_{row:08d}` if it is None. Call once for each row."""
        generated = f"task_{len(self._is_generated):08d}"
        is_generated = wanted is None and not self._is_taken(generated)
        name = generated if is_generated else self._with_suffix(wanted or generated)
        if not is_generated:
            self._used.add(name)
        self._is_generated.append(is_generated)
        return name

    def _with_suffix(self, wanted: str) -> str:
        name = wanted
        while self._is_taken(name):
            self._copies[wanted] = self._copies.get(wanted, 0) + 1
            name = f"{wanted}_{self._copies[wanted]}"
        self.renamed += name != wanted
        return name

    def _is_taken(self, name: str) -> bool:
        match = _GENERATED_ID.fullmatch(name)
        if match is not None and name == f"task_{int(match[1]):08d}" and int(match[1]) < len(self._is_generated):
            return bool(self._is_generated[int(match[1])]) or name in self._used
        return name in self._used


def stream_line(row: SourceRow, options: StreamOptions) -> dict[str, Any]:
    """The stream line of a row, with its task id under "task_id" if the source has one.

    `options.column_name` holds the sample: pairs are an ARC task, a string is a text, objects with a role are messages,
    whole numbers are token ids. Rows without the default column are read by their own keys. Raises ValueError if the
    row is not a sample.
    """
    values = {key: value for key, value in row.values.items() if key not in options.drop_columns}
    if options.id_column not in values and options.id_column != "task_id":
        raise ValueError(f"no column {options.id_column!r}: the columns are {', '.join(values)}")
    task_id = values.pop(options.id_column, None)
    content = _content(values, options.column_name)
    line = {"task_id": row.task_id if task_id is None else task_id, **content}
    line.update((key, value) for key, value in values.items() if key not in content and key != options.column_name)
    parse_object(line)
    return line


def _content(values: dict[str, Any], column: str) -> dict[str, Any]:
    if column in values:
        content = _content_of_column(values[column])
        clash = next((key for key in _CONTENT_KEYS if key in values and key not in (column, *content)), None)
        clash = clash or next((key for key in content if key in values and key != column), None)
        if clash is not None:
            raise ValueError(f"the column {clash!r} would be read as a second sample: pass --drop_columns {clash}")
        return content
    if column != DEFAULT_COLUMN:
        raise ValueError(f"no column {column!r}: the columns are {', '.join(values)}")
    kind = kind_of(values)
    return {key: values[key] for key in (("train", "test") if kind == "arc" else (kind,))}


def _content_of_column(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, list):
        raise ValueError(f"the column is {value!r:.40}: expected pairs of grids, a text, messages or token ids")
    if value and all(type(item) is int for item in value):
        return {"input_ids": value}
    if value and all(isinstance(item, dict) and "role" in item for item in value):
        return {"messages": value}
    return task_from_pairs(value)


def create_streams(options: StreamOptions) -> StreamsSummary:
    """Deals the rows of a source round robin to `stream_000.jsonl` … in the output folder, which may be a URL.

    Existing streams with the same bytes are left alone. Raises UsageError if different ones exist and `overwrite` is
    off, or if there are fewer samples than streams, and RunError at the first row that is not a sample; then nothing
    is written.
    """
    _check_options(options)
    rows = read_source(options.dataset_name, options.split, options.config, options.text_unit)
    store = open_store(options.output_dir)
    with _staging_folder(store) as folder:
        lines = _Lines(rows, options)
        parts = [folder / f"stream_{index:03d}.jsonl" for index in range(options.num_streams)]
        _write_parts(parts, lines)
        lines.check_fill(options.num_streams, "streams")
        stored = _publish(parts, store, options.overwrite)
    base = options.output_dir.rstrip("/")
    samples = [len(range(index, lines.count, options.num_streams)) for index in range(options.num_streams)]
    return lines.summary(
        WrittenStream(f"{base}/{name}", count, info.size, info.crc32c)
        for (name, info), count in zip(stored.items(), samples, strict=True)
    )


def create_sharded_dataset(options: StreamOptions) -> StreamsSummary:
    """Cuts the rows of a source into `num_shards` dataset shards of consecutive tasks, each a folder of chunks.

    The summary's streams are the shards. If the same dataset is there already, in whole or in part, it is completed.
    Raises as `create_streams` does.
    """
    _check_options(options)
    rows = read_source(options.dataset_name, options.split, options.config, options.text_unit)
    with _staging_folder(open_store(options.output_dir)) as folder:
        lines = _Lines(rows, options)
        # All tasks must be counted before the first shard can be cut.
        part = folder / "lines.jsonl"
        _write_parts([part], lines)
        lines.check_fill(options.num_shards, "shards")
        manifest = write_dataset(
            part,
            lines.count,
            options.output_dir,
            num_shards=options.num_shards,
            chunk_size_mb=options.chunk_size_mb,
            overwrite=options.overwrite,
        )
    base = options.output_dir.rstrip("/")
    return lines.summary(
        WrittenStream(f"{base}/{shard.name}", shard.num_tasks, shard.bytes, shard.crc32c) for shard in manifest.shards
    )


def _check_options(options: StreamOptions) -> None:
    for name in ("num_streams", "num_shards", "max_samples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    if not 0 < options.chunk_size_mb < float("inf"):
        raise UsageError(f"--chunk_size_mb {options.chunk_size_mb}: must be above 0 and finite")


class _Lines:
    """The encoded lines of a source; counts them as they are read."""

    def __init__(self, rows: Iterator[SourceRow], options: StreamOptions) -> None:
        self.kind: Kind | None = None
        self.count = 0
        self.skipped_empty = 0
        self.ids = TaskIds()
        self._rows = rows
        self._options = options

    def __iter__(self) -> Iterator[bytes]:
        for row in self._rows:
            if row.is_blank or (self._options.skip_empty and self._is_empty(row)):
                self.skipped_empty += 1
                continue
            try:
                encoded = self._encode(row)
            except ValueError as error:
                raise RunError(f"{row.where}: {error}") from None
            self.count += 1
            yield encoded
            if self.count == self._options.max_samples:
                return

    def check_fill(self, parts: int, what: str) -> None:
        """Raises RunError if there is no sample, UsageError if there are fewer samples than parts."""
        if not self.count:
            raise RunError(f"{self._options.dataset_name}: it has no samples")
        if self.count < parts:
            raise UsageError(f"{self.count} samples cannot fill {parts} {what}: pass --num_{what} {self.count}")

    def summary(self, streams: Iterable[WrittenStream]) -> StreamsSummary:
        """The summary, once all lines have been written."""
        assert self.kind is not None
        return StreamsSummary(self.kind, self.count, tuple(streams), self.skipped_empty, self.ids.renamed)

    def _is_empty(self, row: SourceRow) -> bool:
        column = self._options.column_name if self._options.column_name in row.values else "text"
        text = row.values.get(column)
        return isinstance(text, str) and not text.strip()

    def _encode(self, row: SourceRow) -> bytes:
        line = stream_line(row, self._options)
        kind = kind_of(line)
        self.kind = self.kind or kind
        if kind != self.kind:
            raise ValueError(f"a sample of kind {kind} in a source of kind {self.kind}: a stream holds one kind")
        wanted = line["task_id"]
        line["task_id"] = self.ids.unique(None if wanted is None else str(wanted))
        return _encode_line(line)


def _encode_line(line: dict[str, Any]) -> bytes:
    try:
        return _dump(line)
    except (TypeError, ValueError, RecursionError):
        for column, value in line.items():
            try:
                _dump(value)
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"the column {column!r} is not JSON ({error}): pass --drop_columns {column}") from None
        raise


def _dump(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_iso_time)
    return text.encode() + b"\n"


def _iso_time(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"it holds {type(value).__name__}")


@contextmanager
def _staging_folder(store: ObjectStore) -> Iterator[Path]:
    """A folder for unfinished streams, inside a local output folder so that they can be renamed into place."""
    target = store.root if isinstance(store, LocalStore) else None
    made = target is not None and not target.is_dir()
    with storage_errors(f"{store.url}: cannot write there"):
        if target is not None:
            target.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".unfinished_streams_", dir=target))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if target is not None and made and not any(target.iterdir()):
            target.rmdir()


def _write_parts(parts: Sequence[Path], lines: _Lines) -> None:
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(open(part, "wb")) for part in parts]
            for index, line in enumerate(lines):
                files[index % len(files)].write(line)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"cannot write the streams: {error}") from error


def _publish(parts: Sequence[Path], store: ObjectStore, overwrite: bool) -> dict[str, ObjectInfo]:
    """Moves finished streams into the output folder; returns name → size and checksum, in order."""
    wanted = {part.name: file_info(part) for part in parts}
    with storage_errors(f"{store.url}: cannot write the streams"):
        existing = [name for name in _names(store) if _STREAM_NAME.fullmatch(name)]
        other = [name for name in existing if name not in wanted or store.info(name) != wanted[name]]
        if other and not overwrite:
            raise UsageError(
                f"{store.url}/{other[0]}: another stream is already there: pass --overwrite or another --output_dir"
            )
        missing = [part for part in parts if part.name not in existing or part.name in other]
        if isinstance(store, LocalStore):
            _rename_into(store, missing, [name for name in other if name not in wanted])
        else:
            _store_new(store, missing, wanted, other)
    return wanted


def _names(store: ObjectStore) -> list[str]:
    # A store lists recursively, which is slow in a local folder with many other files.
    return sorted(os.listdir(store.root)) if isinstance(store, LocalStore) else store.list("stream_")


def _rename_into(store: LocalStore, parts: Sequence[Path], surplus: Sequence[str]) -> None:
    """Replaces each stream in one step, so that the old one is readable until then."""
    for part in parts:
        part.replace(store.root / part.name)
    for name in surplus:
        store.delete(name)
    sync_folder(store.root)


def _store_new(
    store: ObjectStore, parts: Sequence[Path], wanted: Mapping[str, ObjectInfo], other: Sequence[str]
) -> None:
    """Creates each stream. Different ones are deleted first, so that old and new streams are never mixed."""
    for name in other:
        store.delete(name)
    for part in parts:
        check_not_taken(store, part.name, store.create_file(part.name, part, wanted[part.name]))
