"""Checks the files of one window: checksums against the commit record, arrays against the sample table."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np
from isal import igzip
from jaxtyping import Int32, UInt8

from core.base.dtypes import ARRAY_DTYPES
from core.base.errors import RunError
from core.base.json_types import Kinds, require_all, require_types
from core.commit.record import CommitRecord, PartCounts, StoredFile, StoredSite
from core.object_store import LocalStore, ObjectStore
from core.object_store.sinks import DigestWriter, FileDigest, digest_stream
from core.reduce.reductions import INDICES, SCALE, VALUES
from core.samples.selection import count_reasons, reasons_from_ranges
from core.shards.formats import StoredShard, read_shard
from core.shards.names import shard_stem

# Files from a bucket are kept in memory up to this size, and in a temporary file beyond it.
_SPOOL_BYTES = 64 << 20
_COPY_BYTES = 4 << 20
_ROW: Kinds = {"sample_idx": (int,), "n_tokens": (int,), "token_ids": (list,)}


@dataclass(frozen=True)
class CheckedRow:
    """The fields of a sample's line in the table that are checked.

    Attributes:
      n_tokens: of the stored tokens; token_ids: of all tokens that the model saw.
      reasons: why each of them is not stored, 0 for one that is; None where all are stored.
    """

    sample_idx: int
    n_tokens: int
    token_ids: Int32[np.ndarray, "T"]
    reasons: UInt8[np.ndarray, "T"] | None

    @property
    def positions(self) -> np.ndarray | None:
        """The positions of the stored tokens; None where all are stored."""
        return None if self.reasons is None else np.flatnonzero(self.reasons == 0)


@dataclass(frozen=True)
class CheckedWindow:
    """The sample indices of a window, from its table, and the problems of its files."""

    sample_idx: tuple[int, ...]
    problems: tuple[str, ...]


def check_window(store: ObjectStore, folder: str, record: CommitRecord, format_name: str) -> CheckedWindow:
    """Reads every file that the record names; at most one shard is in memory at a time."""
    parts = [_check_part(store, folder, record, files, format_name) for _, files in record.files_of_parts()]
    problems = [problem for _, found in parts for problem in found]
    tables = [table for table, _ in parts if table is not None]
    for (counts, files), (table, _) in zip(record.files_of_parts(), parts, strict=True):
        if table is not None:
            name = files[0].name if files else f"{shard_stem(record.window)}.json"
            problems += [f"{name}: {problem}" for problem in _table_problems(table, counts)]
    rows = [row for table in tables for row in table]
    if len(tables) == len(parts):
        problems += _count_problems(rows, record)
    return CheckedWindow(tuple(row.sample_idx for row in rows), tuple(problems))


def _check_part(
    store: ObjectStore, folder: str, record: CommitRecord, files: Sequence[StoredFile], format_name: str
) -> tuple[list[CheckedRow] | None, list[str]]:
    """The sample table of a part of the window, None if it cannot be read, and the problems of its files.

    files: of the part, the table first; a part without samples has none.
    """
    problems: list[str] = []
    table: list[CheckedRow] | None = None if files else []
    for file in files:
        try:
            with _fetched(store, f"{folder}/{file.name}") as (stream, digest):
                mismatch = _digest_mismatch(digest, file)
                if mismatch is not None:
                    problems.append(f"{file.name}: {mismatch}: {_repair_advice(record)}")
                elif file.site is None:
                    table = read_table(stream)
                else:
                    found = _site_problems(stream, file, file.site, table or [], record, format_name)
                    problems += [f"{file.name}: {problem}" for problem in found]
        except FileNotFoundError:
            problems.append(f"{file.name} is missing: {_repair_advice(record)}")
        except (RunError, ValueError, OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            problems.append(f"{file.name}: cannot be read: {reason}")
    return table, problems


def _repair_advice(record: CommitRecord) -> str:
    stem = shard_stem(record.window)
    return f"remove {stem}.json and the files it names, then run the same extraction again"


@contextmanager
def _fetched(store: ObjectStore, name: str) -> Iterator[tuple[BinaryIO, FileDigest]]:
    """A stored file from its beginning, and its digest. A bucket's bytes are read once, a disk's twice."""
    with store.open(name) as stored:
        if isinstance(store, LocalStore):
            digest = digest_stream(stored)
            stored.seek(0)
            yield stored, digest
            return
        with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as spool:
            copy = cast(BinaryIO, spool)
            writer = DigestWriter(copy)
            while chunk := stored.read(_COPY_BYTES):
                writer.write(chunk)
            copy.seek(0)
            yield copy, writer.digest()


def _digest_mismatch(digest: FileDigest, file: StoredFile) -> str | None:
    for field in ("bytes", "crc32c", "sha256"):
        found, recorded = getattr(digest, field), getattr(file, field)
        if found != recorded:
            return f"{field} is {found}, in its record {recorded}"
    return None


def read_table(stream: BinaryIO) -> list[CheckedRow]:
    """A sample table. Raises ValueError naming the invalid line."""
    with igzip.open(stream, "rb") as lines:
        return [_table_row(line, line_number) for line_number, line in enumerate(lines, 1)]


def _table_row(line: bytes, line_number: int) -> CheckedRow:
    row = json.loads(line)
    try:
        require_types(row, _ROW)
        require_all(row["token_ids"], int, "token_ids")
        token_ids = np.array(row["token_ids"], np.int32)
        reasons = reasons_from_ranges(row["dropped"], len(token_ids)) if "dropped" in row else None
    except (ValueError, OverflowError) as error:
        raise ValueError(f"line {line_number}: {error}") from error
    return CheckedRow(row["sample_idx"], row["n_tokens"], token_ids, reasons)


def _table_problems(table: Sequence[CheckedRow], counts: PartCounts) -> Iterator[str]:
    if len(table) != counts.n_samples:
        yield f"it has {len(table)} samples, the record {counts.n_samples}"
    n_tokens = sum(row.n_tokens for row in table)
    if n_tokens != counts.n_tokens:
        yield f"its samples have {n_tokens} stored tokens, the record {counts.n_tokens}"
    listed = (table[0].sample_idx, table[-1].sample_idx) if table else (None, None)
    recorded = (counts.first_sample_idx, counts.last_sample_idx)
    if listed != recorded and table:
        yield f"it has samples {listed[0]} to {listed[1]}, the record {recorded[0]} to {recorded[1]}"
    for row in table:
        n_stored = len(row.token_ids) if row.positions is None else len(row.positions)
        if n_stored != row.n_tokens:
            yield f"sample {row.sample_idx} has {n_stored} token ids for {row.n_tokens} tokens"


def _count_problems(rows: Sequence[CheckedRow], record: CommitRecord) -> Iterator[str]:
    """Compares the record's counts of the whole window with the sample table."""
    n_empty = sum(row.n_tokens == 0 for row in rows)
    if n_empty != record.n_empty:
        yield f"{n_empty} of its samples have no stored token, by its record {record.n_empty}"
    dropped = count_reasons(row.reasons for row in rows if row.reasons is not None)
    if dropped != record.n_dropped:
        yield f"its sample table leaves out {dropped} tokens, its record {record.n_dropped}"


def _site_problems(
    stream: BinaryIO, file: StoredFile, site: str, table: Sequence[CheckedRow], record: CommitRecord, format_name: str
) -> list[str]:
    """The problems of one shard; a function of its own, so that the shard is freed before the next one is read."""
    shard = read_shard(stream, format_name, gzipped=file.name.endswith(".gz"))
    return list(_shard_problems(shard, site, table, record))


def _shard_problems(shard: StoredShard, site: str, table: Sequence[CheckedRow], record: CommitRecord) -> Iterator[str]:
    layers, width = record.sites[site].layers, record.sites[site].width
    if tuple(shard.layers) != layers:
        yield f"it has layers {list(shard.layers)}, the record {list(layers)}"
    if list(shard.sample_idx) != [row.sample_idx for row in table]:
        yield "its samples are not those of the sample table"
        return
    if not record.pools:
        yield from _token_problems(shard, table)
    wanted = _wanted_arrays(record, record.sites[site])
    stored = {VALUES: shard.layers} | shard.more
    if stored.keys() != wanted.keys():
        yield f"it has {', '.join(stored)} for each sample, the record {', '.join(wanted)}"
        return
    for name, (columns, dtype) in wanted.items():
        for layer, arrays in stored[name].items():
            for row, array in zip(table, arrays, strict=True):
                wrong = _array_problem(name, array, (_n_rows(record, row), columns), dtype, width)
                if wrong is not None:
                    yield f"layer {layer}, sample {row.sample_idx}{'' if name == VALUES else ', ' + name}: {wrong}"


def _wanted_arrays(record: CommitRecord, site: StoredSite) -> dict[str, tuple[int, np.dtype]]:
    """By name, entries per row and dtype."""
    if not site.arrays:
        return {VALUES: (site.width, ARRAY_DTYPES[record.dtype])}
    return {name: (array["width"], ARRAY_DTYPES[array["dtype"]]) for name, array in site.arrays.items()}


def _n_rows(record: CommitRecord, row: CheckedRow) -> int:
    return min(1, row.n_tokens) * len(record.pools) if record.pools else row.n_tokens


def _array_problem(name: str, array: np.ndarray, shape: tuple[int, int], dtype: np.dtype, width: int) -> str | None:
    """The problem of one array, or None. width: of the rows that `indices` point into."""
    if array.shape != shape:
        return f"shape {array.shape} instead of {shape}"
    if array.dtype != dtype:
        return f"dtype {array.dtype} instead of {dtype}"
    if not np.isfinite(array).all():
        return "it contains NaN or infinity"
    if name == SCALE and (array < 0).any():
        return "a scale is negative"
    if name == INDICES:
        ordered = np.sort(array.astype(np.int64), axis=1)
        if ordered.size and (ordered.min() < 0 or ordered.max() >= width or (np.diff(ordered, axis=1) == 0).any()):
            return f"its indices are not {shape[1]} different ones below {width}"
    return None


def _token_problems(shard: StoredShard, table: Sequence[CheckedRow]) -> Iterator[str]:
    """Compares the shard's token positions and ids with the sample table."""
    for slot, row in enumerate(table):
        wanted = row.positions
        if shard.positions is not None and wanted is not None:
            if not np.array_equal(shard.positions[slot], wanted):
                yield f"sample {row.sample_idx}: its token positions are not those of the sample table"
        elif (shard.positions is None) != (wanted is None):
            yield f"sample {row.sample_idx}: only one of the shard and the sample table leaves tokens out"
            return
        ids = row.token_ids if wanted is None else row.token_ids[wanted]
        if shard.token_ids is not None and not np.array_equal(shard.token_ids[slot], ids):
            yield f"sample {row.sample_idx}: its token ids are not those of the sample table"
