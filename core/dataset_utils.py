"""Streams: JSON Lines files of samples, read in flat memory, each line told apart by its keys.

A line is an ARC task (`train` and `test`, or the `examples` pairs of Hugging Face sets), `{"text": ...}`,
`{"messages": [...]}` or `{"input_ids": [...]}`. `task_id` names it; every other key is a label that travels with the
sample. A line's position, counted from 0, is its identity: it is the same for every worker, selection and resume.

The folder of a dataset shard (see `core.sharded_dataset`) is a stream too: its positions go on from shard to shard.
"""

import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, NamedTuple, cast
from urllib.parse import urlsplit

import fsspec
import google_crc32c
import zstandard

from arc24.tasks import validate_task
from core.errors import RunError, UsageError
from core.object_store import ObjectInfo, ObjectStore, is_loopback, open_store
from core.redaction import redact
from core.sharded_dataset import ShardEntry, check_chunk, find_shard, is_dataset

Kind = Literal["arc", "text", "messages", "input_ids"]

_CHUNK_BYTES = 1 << 20
# What one call decompresses is held in memory at once and may be ten thousand times as much.
_COMPRESSED_CHUNK_BYTES = 1 << 12
_ZSTD_LONGEST_WINDOW = 1 << 31
_NUMBERED_STREAM = re.compile(r"(.*stream_)([0-9]+)(\.jsonl(?:\.gz|\.zst)?)")
_CLEAR_SCHEMES = ("http", "ftp", "ws", "webhdfs", "webdav")
_BLANK = "blank line: remove it, or make it a sample"


@dataclass(frozen=True)
class StreamRecord:
    """One well-formed line.

    `payload` is the task dict for "arc" (always with `train` and `test`), the text, the list of messages or the list of
    token ids.
    """

    position: int
    """Place among the lines of the stream, from 0; for a shard: of the whole dataset."""
    line: int
    """Line of the file (for a shard: of the chunk), from 1."""
    kind: Kind
    payload: Any
    task_id: str | None
    labels: dict[str, Any]


@dataclass(frozen=True)
class BadRecord:
    """One line that is no sample, and why."""

    position: int
    line: int
    reason: str


class Content(NamedTuple):
    """What a JSON object holds as a sample."""

    kind: Kind
    payload: Any
    task_id: str | None
    labels: dict[str, Any]


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
    `position % total_machines == machine_id`. `max_tasks` keeps the first that many
    lines of the machine, bad ones and those before `start_position` counted, so that a resumed reading ends where an
    uninterrupted one does. Lines that are not yielded are not parsed, except until the stream's kind is known: it is
    that of the first line that has one, and a line of another kind is a bad record. Blank lines at the end are ignored.

    Raises UsageError for a missing file or a selection that cannot be, and RunError, while reading, for an empty stream
    or a damaged .gz or .zst.
    """
    if total_machines < 1 or not 0 <= machine_id < total_machines:
        raise UsageError(f"machine id {machine_id} is not one of the {total_machines} machines 0..{total_machines - 1}")
    if max_tasks is not None and max_tasks < 1:
        raise UsageError(f"the number of tasks to read is at least 1, not {max_tasks}")
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
        raise RunError(f"{path}: the stream is empty: a stream holds one JSON object a line")


def first_selected(first_position: int, machine_id: int, total_machines: int) -> int:
    """The first position from `first_position` on that belongs to the machine."""
    return first_position + (machine_id - first_position) % total_machines


def survey_records(
    path: str, machine_id: int, total_machines: int, max_tasks: int | None, *, wanted: int
) -> tuple[int, list[StreamRecord | BadRecord]]:
    """How many records `read_stream` yields, and from `wanted` to twice as many of them, spread evenly, in one pass."""
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


def _numbered_lines(path: str, shard: ShardEntry | None) -> Iterator[tuple[int, int, bytes]]:
    """Position, line of its file, and bytes of each line."""
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
            raise RunError(f"{path}/{chunk.name}: {line} lines, its metadata says {chunk.num_tasks}: make it again")


def _parse_line(raw: bytes, position: int, line: int, stream_kind: Kind | None) -> StreamRecord | BadRecord:
    try:
        content = parse_object(parse_json_line(raw))
        if stream_kind not in (None, content.kind):
            raise ValueError(f"{content.kind} line in a stream of {stream_kind} lines")
        return StreamRecord(position, line, *content)
    except ValueError as error:
        return BadRecord(position, line, str(error))


def _kind_of_line(raw: bytes, record: StreamRecord | BadRecord) -> Kind | None:
    """The kind that a line gives its stream: a bad line's keys count too, so that one bad grid changes nothing else."""
    if isinstance(record, StreamRecord):
        return record.kind
    try:
        return kind_of(parse_json_line(raw))
    except ValueError:
        return None


def parse_json_line(raw: bytes) -> dict[str, Any]:
    """The JSON object on one line. Raises ValueError, saying what is wrong with it."""
    if not raw.strip():
        raise ValueError(_BLANK)
    try:
        text = raw.rstrip().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at column {error.colno}") from None
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair, which no encoding can write") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a line is a JSON object, not {_json_type(value)}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"broken JSON: {name} is not a JSON value")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def kind_of(value: dict[str, Any]) -> Kind:
    """What kind of sample an object is, by its keys. Raises ValueError if it is none or more than one."""
    found: list[tuple[Kind, str]] = []
    if "train" in value and "test" in value:
        found.append(("arc", "train"))
    if "examples" in value:
        found.append(("arc", "examples"))
    found += [(kind, kind) for kind in ("text", "messages", "input_ids") if kind in value]
    if len(found) > 1:
        raise ValueError(f"the keys {' and '.join(repr(key) for _, key in found)} name more than one sample")
    if found:
        return found[0][0]
    if "train" in value or "test" in value:
        missing = "test" if "train" in value else "train"
        raise ValueError(f"the task has no {missing!r}")
    known = "'train' and 'test', 'examples', 'text', 'messages' or 'input_ids'"
    raise ValueError(f"no sample: expected {known}, found {', '.join(map(repr, value)) or 'no keys'}"[:300])


def parse_object(value: dict[str, Any]) -> Content:
    """The sample that an object is. Raises ValueError, saying what is wrong with it."""
    kind = kind_of(value)
    labels = dict(value)
    task_id = _task_id(labels.pop("task_id", None))
    if kind != "arc":
        payload = labels.pop(kind)
        _VALIDATORS[kind](payload)
    else:
        payload = (
            task_from_pairs(labels.pop("examples"))
            if "examples" in labels
            else {part: labels.pop(part) for part in ("train", "test")}
        )
        validate_task(payload)
    return Content(kind, payload, task_id, labels)


def _task_id(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    if type(value) is int:
        return str(value)
    raise ValueError(f"task_id is a non-empty text or a whole number, not {json.dumps(value)[:40]}")


def task_from_pairs(pairs: Any) -> dict[str, Any]:
    """The ARC task of a list of [input, output] pairs, or of such objects: the last pair is the test.

    Grids are not looked at. Raises ValueError if there are fewer than two pairs.
    """
    if not isinstance(pairs, list):
        raise ValueError(f"'examples' is a list of [input, output] pairs, not {_json_type(pairs)}")
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} [input, output] pairs: a task needs at least 2, of which the last is the test")
    named = [_named_pair(pair, index) for index, pair in enumerate(pairs)]
    return {"train": named[:-1], "test": named[-1:]}


def _named_pair(pair: Any, index: int) -> dict[str, Any]:
    if isinstance(pair, dict):
        return pair
    if not isinstance(pair, list) or len(pair) != 2:
        raise ValueError(f"pair {index} is not an [input, output] pair")
    return {"input": pair[0], "output": pair[1]}


def _validate_text(text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"'text' is a text, not {_json_type(text)}")
    if not text:
        raise ValueError("'text' is empty")


def _validate_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' is a non-empty list of objects with 'role' and 'content'")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{index}] is an object with 'role' and 'content', not {_json_type(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"messages[{index}] needs a text as its {key!r}")


def _validate_input_ids(ids: Any) -> None:
    if not isinstance(ids, list) or not ids:
        raise ValueError("'input_ids' is a non-empty list of token ids")
    if set(map(type, ids)) != {int}:
        odd = next(token for token in ids if type(token) is not int)
        raise ValueError(f"'input_ids' holds {json.dumps(odd)[:40]}: token ids are whole numbers")
    if min(ids) < 0 or max(ids) >= 1 << 31:
        raise ValueError("'input_ids' holds a number outside 0..2147483647")


_VALIDATORS: dict[str, Callable[[Any], None]] = {
    "text": _validate_text,
    "messages": _validate_messages,
    "input_ids": _validate_input_ids,
}


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def samples_per_record(kind: Kind, predictions: int) -> int:
    """How many samples one line makes: an ARC task is augmented `predictions` times, anything else is used once."""
    return predictions if kind == "arc" else 1


def sample_index(record: StreamRecord, prediction: int, predictions: int) -> int:
    """The `sample_idx` of one sample: its place in the stream if every line, bad ones too, made its samples.

    Raises ValueError if the record makes no such prediction.
    """
    count = samples_per_record(record.kind, predictions)
    if not 0 <= prediction < count:
        raise ValueError(f"prediction {prediction} of a record that makes {count} samples")
    return record.position * count + prediction


def format_bad(path: str, bad: BadRecord) -> str:
    """`file:line: reason`, as compilers write it; the file is the chunk when the stream is a shard."""
    shard = find_shard(path)
    file = f"{path}/{shard.chunk_at(bad.position).name}" if shard else path
    return f"{file}:{bad.line}: {bad.reason}"


def resolve_stream_path(path: str) -> str:
    """The path itself, or its other spelling (`stream_0.jsonl`, `stream_000.jsonl`) if only that exists.

    Raises UsageError if neither is a file nor the folder of a dataset shard.
    """
    with storage_errors(f"{path}: cannot look for the stream"):
        for spelling in [path, *_other_spellings(path)]:
            if _is_file(spelling):
                return spelling
        if find_shard(path) is not None:
            return path.rstrip("/")
        fs, location = filesystem(path)
        if not fs.isdir(location):
            raise UsageError(f"{path}: no such file")
        advice = ": pass --use_sharded_dataset --sharded_dataset_dir" if is_dataset(path) else ""
        raise UsageError(f"{path}: is a folder, not a stream{advice}")


def _is_file(path: str) -> bool:
    if _in_bucket(path):
        store, name = _bucket_object(path)
        return store.info(name) is not None
    fs, location = filesystem(path)
    return fs.isfile(location)


def _other_spellings(path: str) -> list[str]:
    numbered = _NUMBERED_STREAM.fullmatch(path)
    if numbered is None:
        return []
    start, digits, end = numbered.groups()
    spellings = (f"{start}{int(digits):03d}{end}", f"{start}{int(digits)}{end}")
    return [spelling for spelling in spellings if spelling != path]


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a path or URL, and the path inside it. Raises UsageError for an unknown protocol."""
    _refuse_unsafe_url(path)
    try:
        return fsspec.core.url_to_fs(path, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{path}: {error}") from error


def _refuse_unsafe_url(path: str) -> None:
    """Raises UsageError for a URL that travels in the clear, or carries a password into logs and records."""
    for scheme, host in re.findall(r"(?:^|::)([A-Za-z][A-Za-z0-9+.-]*)://([^/:]*(?::[^/:]*)*)", path):
        shown = redact(path)
        if scheme.lower() in _CLEAR_SCHEMES and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            raise UsageError(f"{shown}: {scheme} is for loopback only: use https, gs:// or a local copy")
        if "@" in host:
            raise UsageError(f"{shown}: leave user and password out of the URL, use the environment or ~/.netrc")


def _in_bucket(path: str) -> bool:
    return path.startswith(("gs://", "gcs://"))


def _bucket_object(path: str) -> tuple[ObjectStore, str]:
    """The store reads one generation of an object, and repeats what fails or stalls; gcsfs alone does neither."""
    folder, _, name = path.rpartition("/")
    return open_store(folder), name


def _open_stored(path: str) -> BinaryIO:
    if _in_bucket(path):
        store, name = _bucket_object(path)
        return store.open(name)
    fs, location = filesystem(path)
    return fs.open(location, "rb")


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turns whatever a filesystem raises into a RunError that starts with `what`.

    Object stores raise errors of their HTTP and login libraries, which share no base class but Exception.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"{what}: {str(error) or type(error).__name__}") from error


def read_lines(path: str) -> Iterator[bytes]:
    """The lines of a plain, .gz or .zst file as they are, but for a byte order mark.

    Raises RunError naming the file and the line if it cannot be read to its end.
    """
    line = 0
    try:
        with _open_stored(path) as stored, _decompressed(stored, path) as lines:
            for raw in lines:
                yield raw.removeprefix(b"\xef\xbb\xbf") if line == 0 else raw
                line += 1
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise RunError(f"{path}: damaged or cut off after line {line} ({error}): make or copy it again") from error
    except Exception as error:
        raise RunError(f"{path}: cannot read on after line {line}: {str(error) or type(error).__name__}") from error


def read_jsonl_lines(path: str) -> Iterator[bytes]:
    """`read_lines` without the blank lines at the end; those before stand as empty lines, so that places stay."""
    blank_lines = 0
    for raw in read_lines(path):
        if not raw.strip():
            blank_lines += 1
            continue
        for _ in range(blank_lines):
            yield b""
        blank_lines = 0
        yield raw


def _decompressed(stored: BinaryIO, path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=stored)  # type: ignore[return-value]
    raw = _ZstdReader(stored) if path.endswith(".zst") else stored
    return io.BufferedReader(cast(io.RawIOBase, raw), _CHUNK_BYTES)


class _ZstdReader(io.RawIOBase):
    """Zstandard frames as one stream of bytes. The package's own reader takes a cut-off frame for a finished one."""

    def __init__(self, stored: BinaryIO) -> None:
        self._stored = stored
        self._pending = memoryview(b"")
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending and self._decompress_next():
            pass
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def _decompress_next(self) -> bool:
        between_frames = self._frame is None or self._frame.eof
        left_over = self._frame.unused_data if self._frame is not None and between_frames else b""
        compressed = left_over or self._stored.read(_COMPRESSED_CHUNK_BYTES)
        if not compressed and between_frames:
            return False
        if not compressed:
            raise EOFError("the last zstandard frame has no end")
        if between_frames:
            self._frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_LONGEST_WINDOW).decompressobj()
        self._pending = memoryview(self._frame.decompress(compressed))
        return True


def stream_identity(path: str) -> dict[str, Any]:
    """`name`, `bytes` and `crc32c` (8 hex digits) of the stored file: the same for a local and a remote copy.

    A bucket is asked for the checksum that it keeps, a shard's metadata for those of its chunks; other files are read.
    """
    path = resolve_stream_path(path)
    with storage_errors(f"{path}: cannot read"):
        shard = find_shard(path)
        if shard is not None:
            return shard.identity
        info = _stored_info(path)
    return {"name": _without_query(path).rsplit("/", 1)[-1], "bytes": info.size, "crc32c": info.crc32c}


def _without_query(path: str) -> str:
    """A URL without its query, which may sign the request; a local path as it is."""
    return path.partition("?")[0] if "://" in path else path


def _stored_info(path: str) -> ObjectInfo:
    if _in_bucket(path):
        store, name = _bucket_object(path)
        found = store.info(name)
        if found is None:
            raise FileNotFoundError("it is gone")
        return found
    size = 0
    checksum = google_crc32c.Checksum()
    with _open_stored(path) as stored:
        while chunk := stored.read(_CHUNK_BYTES):
            size += len(chunk)
            checksum.update(chunk)
    return ObjectInfo(size, checksum.digest().hex())
