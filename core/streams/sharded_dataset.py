"""Sharded datasets: one set of samples cut into dataset shards that workers claim one after another.

    <dir>/shard_000/chunk_0000.jsonl …   consecutive lines of the dataset
    <dir>/shard_000/metadata.json        the shard's chunks, with sizes and checksums
    <dir>/master_metadata.json           all shards; written last: without it the dataset is incomplete

A dataset shard holds consecutive tasks, and its folder is a stream: its lines are those of its chunks, and a line's
position counts from the start of the whole dataset.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import google_crc32c

from core.base.canonical_json import canonical_json
from core.base.errors import RunError, UsageError
from core.object_store import Created, ObjectInfo, ObjectStore, bytes_info, open_store

MASTER_FILE = "master_metadata.json"
SHARD_FILE = "metadata.json"
SHARD_NAME = re.compile(r"shard_[0-9]{3,}")
CHUNK_NAME = re.compile(r"chunk_[0-9]{4,}\.jsonl(\.gz|\.zst)?")

_DATASET_FILE = re.compile(rf"{re.escape(MASTER_FILE)}|{SHARD_NAME.pattern}/({SHARD_FILE}|{CHUNK_NAME.pattern})")
_UPLOAD_THREADS = 8

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class ChunkEntry:
    """One file of a dataset shard: its name in the shard's folder, number of lines, and stored bytes and crc32c."""

    name: str
    num_tasks: int
    bytes: int
    crc32c: str


@dataclass(frozen=True)
class DatasetShard:
    """One dataset shard, as in `metadata.json` and `master_metadata.json`; its tasks are consecutive."""

    shard_id: int
    name: str
    num_tasks: int
    first_task: int
    chunks: tuple[ChunkEntry, ...]

    @property
    def bytes(self) -> int:
        """Stored bytes of all chunks."""
        return sum(chunk.bytes for chunk in self.chunks)

    @property
    def crc32c(self) -> str:
        """Checksum of the list of chunks with their sizes and checksums, 8 hex digits; needs no chunk to be read."""
        listed = "".join(f"{chunk.name} {chunk.bytes} {chunk.crc32c}\n" for chunk in self.chunks)
        return f"{google_crc32c.value(listed.encode()):08x}"

    @property
    def identity(self) -> dict[str, Any]:
        """The shard's identity as a stream."""
        return {"name": self.name, "bytes": self.bytes, "crc32c": self.crc32c}

    def chunk_at(self, position: int) -> ChunkEntry:
        """The chunk that holds the task at `position` of the dataset. Raises ValueError if another shard does."""
        ends = accumulate((chunk.num_tasks for chunk in self.chunks), initial=self.first_task)
        for chunk, start in zip(self.chunks, ends, strict=False):
            if start <= position < start + chunk.num_tasks:
                return chunk
        raise ValueError(f"task {position} is not in {self.name}")


@dataclass(frozen=True)
class DatasetManifest:
    """A complete sharded dataset."""

    total_tasks: int
    num_shards: int
    chunk_size_mb: float
    shards: tuple[DatasetShard, ...]


@dataclass(frozen=True)
class _Piece:
    """A chunk that is still part of the one staged file, and its offset there."""

    offset: int
    chunk: ChunkEntry


def read_dataset(url: str) -> DatasetManifest:
    """The manifest of the dataset at `url`; every name in it has been checked and may be used in a path.

    Raises UsageError if no complete dataset is there, RunError if its manifest is inconsistent.
    """
    store = open_store(url)
    try:
        data = store.read_bytes(MASTER_FILE)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{url}: no {MASTER_FILE}: pass a folder that create_dataset_streams.py --sharded has finished writing"
        ) from None
    return _parsed(data, _dataset_of, f"{store.url}/{MASTER_FILE}")


def find_shard(path: str) -> DatasetShard | None:
    """The dataset shard in the folder `path`; None if it is not such a folder, in most cases by its name alone.

    Raises RunError if its metadata is inconsistent.
    """
    folder = path.rstrip("/")
    if not SHARD_NAME.fullmatch(folder.rpartition("/")[2]):
        return None
    store = open_store(folder)
    try:
        data = store.read_bytes(SHARD_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    where = f"{folder}/{SHARD_FILE}"
    shard = _parsed(data, _shard_of, where)
    if shard.name != folder.rpartition("/")[2]:
        raise RunError(f"{where} describes {shard.name}: rename the folder, or copy the dataset again")
    return shard


def is_dataset(path: str) -> bool:
    """Whether a complete sharded dataset is at `path`."""
    return open_store(path).info(MASTER_FILE) is not None


def check_chunk(folder: str, chunk: ChunkEntry) -> None:
    """Raises RunError unless the chunk in a shard's folder has the size and checksum in the metadata."""
    found = open_store(folder).info(chunk.name)
    if found is None:
        raise RunError(f"{folder}/{chunk.name}: no such file: copy the dataset again")
    if found != ObjectInfo(chunk.bytes, chunk.crc32c):
        raise RunError(
            f"{folder}/{chunk.name} has {found.size} bytes with crc32c {found.crc32c}, {SHARD_FILE} lists "
            f"{chunk.bytes} with {chunk.crc32c}: it was changed after the dataset was made; make or copy it again"
        )


def _parsed(data: bytes, parse: Callable[[Any], Parsed], where: str) -> Parsed:
    try:
        return parse(json.loads(data))
    except (ValueError, OverflowError, RecursionError) as error:
        raise RunError(f"{where}: not the metadata of a sharded dataset: {error}") from None


def _dataset_of(value: Any) -> DatasetManifest:
    shards = tuple(_shard_of(item) for item in _field(value, "shards", list))
    manifest = DatasetManifest(
        _field(value, "total_tasks", int),
        _field(value, "num_shards", int),
        float(_field(value, "chunk_size_mb", int, float)),
        shards,
    )
    if len(shards) != manifest.num_shards or [shard.shard_id for shard in shards] != list(range(len(shards))):
        raise ValueError(f"its shards are not numbered 0 to {manifest.num_shards - 1}")
    starts = list(accumulate((shard.num_tasks for shard in shards), initial=0))
    for shard, start in zip(shards, starts, strict=False):
        if shard.first_task != start:
            raise ValueError(f"{shard.name} begins at task {shard.first_task}, the previous shard ends at {start}")
    if starts[-1] != manifest.total_tasks:
        raise ValueError(f"total_tasks is {manifest.total_tasks}, its shards have {starts[-1]}")
    return manifest


def _shard_of(value: Any) -> DatasetShard:
    shard = DatasetShard(
        shard_id=_field(value, "shard_id", int),
        name=_field(value, "name", str),
        num_tasks=_field(value, "num_tasks", int),
        first_task=_field(value, "first_task", int),
        chunks=tuple(_chunk_of(item) for item in _field(value, "chunks", list)),
    )
    if not SHARD_NAME.fullmatch(shard.name) or int(shard.name.removeprefix("shard_")) != shard.shard_id:
        raise ValueError(f"{shard.name!r} is not the name of shard {shard.shard_id}")
    in_chunks = sum(chunk.num_tasks for chunk in shard.chunks)
    if shard.num_tasks != in_chunks:
        raise ValueError(f"{shard.name} has {shard.num_tasks} tasks, its chunks have {in_chunks}")
    if len({chunk.name for chunk in shard.chunks}) != len(shard.chunks):
        raise ValueError(f"{shard.name} lists a chunk twice")
    return shard


def _chunk_of(value: Any) -> ChunkEntry:
    chunk = ChunkEntry(
        name=_field(value, "name", str),
        num_tasks=_field(value, "num_tasks", int),
        bytes=_field(value, "bytes", int),
        crc32c=_field(value, "crc32c", str),
    )
    if not CHUNK_NAME.fullmatch(chunk.name):
        raise ValueError(f"{chunk.name!r} is not the name of a chunk")
    if chunk.num_tasks < 1:
        raise ValueError(f"{chunk.name} has no tasks")
    return chunk


def _field(value: Any, name: str, *kinds: type) -> Any:
    if not isinstance(value, dict) or type(value.get(name)) not in kinds:
        raise ValueError(f"{name!r} is missing or of the wrong type")
    if kinds == (int,) and value[name] < 0:
        raise ValueError(f"{name!r} is negative")
    return value[name]


def shard_sizes(total: int, num_shards: int) -> list[int]:
    """The number of tasks of each shard: they add up to `total`, and no two differ by more than one."""
    return [total // num_shards + (index < total % num_shards) for index in range(num_shards)]


def write_dataset(
    lines: Path, n_lines: int, url: str, *, num_shards: int, chunk_size_mb: float, overwrite: bool = False
) -> DatasetManifest:
    """Cuts a finished JSON Lines file into the dataset at `url`, a local folder or gs://.

    A chunk ends before the line with which it would exceed `chunk_size_mb` MiB. If the same dataset is there already,
    in whole or in part, it is completed. Raises UsageError if a different one is there and `overwrite` is off; then
    nothing is changed.
    """
    with lines.open("rb") as file:
        shards = _cut(file, shard_sizes(n_lines, num_shards), max(1, int(chunk_size_mb * (1 << 20))))
    manifest = DatasetManifest(n_lines, num_shards, chunk_size_mb, tuple(shard for shard, _ in shards))
    records = {f"{shard.name}/{SHARD_FILE}": canonical_json(asdict(shard)) for shard in manifest.shards}
    master = canonical_json(asdict(manifest))
    chunks = {f"{shard.name}/{piece.chunk.name}": piece for shard, pieces in shards for piece in pieces}
    wanted = {name: ObjectInfo(piece.chunk.bytes, piece.chunk.crc32c) for name, piece in chunks.items()}
    wanted |= {name: bytes_info(data) for name, data in (records | {MASTER_FILE: master}).items()}
    store = open_store(url)
    _make_room(store, wanted, overwrite)
    with ThreadPoolExecutor(_UPLOAD_THREADS) as pool:
        list(pool.map(lambda name: _store_chunk(store, name, lines, chunks[name]), chunks))
        list(pool.map(lambda name: check_not_taken(store, name, store.create_bytes(name, records[name])), records))
    check_not_taken(store, MASTER_FILE, store.create_bytes(MASTER_FILE, master))
    return manifest


def _cut(lines: BinaryIO, sizes: Sequence[int], chunk_bytes: int) -> list[tuple[DatasetShard, list[_Piece]]]:
    shards = []
    offset = first_task = 0
    for shard_id, size in enumerate(sizes):
        pieces = list(_pieces(islice(lines, size), offset, chunk_bytes))
        chunks = tuple(piece.chunk for piece in pieces)
        shard = DatasetShard(shard_id, f"shard_{shard_id:03d}", size, first_task, chunks)
        shards.append((shard, pieces))
        offset += shard.bytes
        first_task += size
    return shards


def _pieces(lines: Iterator[bytes], offset: int, chunk_bytes: int) -> Iterator[_Piece]:
    index = tasks = size = crc = 0
    for line in lines:
        if tasks and size + len(line) > chunk_bytes:
            yield _Piece(offset, ChunkEntry(f"chunk_{index:04d}.jsonl", tasks, size, f"{crc:08x}"))
            offset, index = offset + size, index + 1
            tasks = size = crc = 0
        tasks += 1
        size += len(line)
        crc = google_crc32c.extend(crc, line)
    if tasks:
        yield _Piece(offset, ChunkEntry(f"chunk_{index:04d}.jsonl", tasks, size, f"{crc:08x}"))


def _make_room(store: ObjectStore, wanted: dict[str, ObjectInfo], overwrite: bool) -> None:
    """Removes the files of a different dataset if `overwrite`, else raises UsageError when there are any."""
    existing = [name for name in store.list() if _DATASET_FILE.fullmatch(name)]
    other = [name for name in existing if store.info(name) != wanted.get(name)]
    if other and not overwrite:
        raise UsageError(
            f"{store.url}/{other[0]}: another dataset is already there: pass --overwrite or another --output_dir"
        )
    if other:
        # The manifest is deleted first and written last, so that no reader mistakes a half-replaced dataset for a
        # complete one.
        for name in dict.fromkeys([MASTER_FILE, *other]):
            store.delete(name)


def _store_chunk(store: ObjectStore, name: str, lines: Path, piece: _Piece) -> None:
    part = lines.with_name(f"{lines.name}.{piece.offset}")
    try:
        with lines.open("rb") as source, part.open("wb") as target:
            source.seek(piece.offset)
            left = piece.chunk.bytes
            while left:
                left -= target.write(source.read(min(left, 4 << 20)))
        outcome = store.create_file(name, part, ObjectInfo(piece.chunk.bytes, piece.chunk.crc32c))
    finally:
        part.unlink(missing_ok=True)
    check_not_taken(store, name, outcome)


def check_not_taken(store: ObjectStore, name: str, outcome: Created) -> None:
    """Raises RunError if another process created something else under the name after it was found free."""
    if outcome is Created.ALREADY_DIFFERENT:
        raise RunError(f"{store.url}/{name}: another process is writing other data there: use another --output_dir")
