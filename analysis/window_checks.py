"""Checks the files of one window: checksums against the commit record, arrays against the sample table."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np
from isal import igzip

from analysis.stored_plans import mistyped
from core.activation_storage import CommitRecord, StoredFile, shard_stem
from core.errors import RunError
from core.formats import DTYPES, StoredShard, read_shard
from core.object_store import LocalStore, ObjectStore
from core.sinks import DigestWriter, FileDigest, digest_stream

# What comes from a bucket is kept in memory up to this size, and in a temporary file beyond it.
_SPOOL_BYTES = 64 << 20
_COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class TableRow:
    """What the checks need of a sample's line in the table."""

    sample_idx: int
    n_tokens: int
    n_token_ids: int


@dataclass(frozen=True)
class CheckedWindow:
    """The sample indices of a window by its table, and what is wrong with its files."""

    sample_idx: tuple[int, ...]
    problems: tuple[str, ...]


def check_window(store: ObjectStore, folder: str, record: CommitRecord, format_name: str) -> CheckedWindow:
    """Reads every file that the record names; at most one shard is in memory at a time."""
    problems: list[str] = []
    table: list[TableRow] = []
    for file in sorted(record.files, key=lambda file: file.site is not None):
        try:
            with _fetched(store, f"{folder}/{file.name}") as (stream, digest):
                damage = _damage(digest, file)
                if damage is not None:
                    problems.append(f"{file.name}: {damage}: {_mend(record)}")
                elif file.site is None:
                    table = _read_table(stream)
                    problems += [f"{file.name}: {problem}" for problem in _table_problems(table, record)]
                else:
                    found = _site_problems(stream, file, file.site, table, record, format_name)
                    problems += [f"{file.name}: {problem}" for problem in found]
        except FileNotFoundError:
            problems.append(f"{file.name} is missing: {_mend(record)}")
        except (RunError, ValueError, OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            problems.append(f"{file.name}: cannot be read: {reason}")
    return CheckedWindow(tuple(row.sample_idx for row in table), tuple(problems))


def _mend(record: CommitRecord) -> str:
    stem = shard_stem(record.window)
    return f"remove {stem}.json and the files it names, then run the same extraction again"


@contextmanager
def _fetched(store: ObjectStore, name: str) -> Iterator[tuple[BinaryIO, FileDigest]]:
    """A stored file from its beginning, and its digest. Bytes come from a bucket once, from a disk twice."""
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


def _damage(digest: FileDigest, file: StoredFile) -> str | None:
    for what in ("bytes", "crc32c", "sha256"):
        found, recorded = getattr(digest, what), getattr(file, what)
        if found != recorded:
            return f"{what} is {found}, its record says {recorded}"
    return None


def _read_table(stream: BinaryIO) -> list[TableRow]:
    with igzip.open(stream, "rb") as lines:
        return [_table_row(line, number) for number, line in enumerate(lines, 1)]


def _table_row(line: bytes, number: int) -> TableRow:
    row = json.loads(line)
    wrong = mistyped(row, {"sample_idx": (int,), "n_tokens": (int,), "token_ids": (list,)})
    if wrong is not None:
        raise ValueError(f"line {number}: {wrong!r} is missing or of the wrong type")
    return TableRow(row["sample_idx"], row["n_tokens"], len(row["token_ids"]))


def _table_problems(table: Sequence[TableRow], record: CommitRecord) -> Iterator[str]:
    if len(table) != record.n_samples:
        yield f"it lists {len(table)} samples, the record says {record.n_samples}"
    n_tokens = sum(row.n_tokens for row in table)
    if n_tokens != record.n_tokens:
        yield f"its samples have {n_tokens} tokens, the record says {record.n_tokens}"
    for row in table:
        if row.n_token_ids != row.n_tokens:
            yield f"sample {row.sample_idx} has {row.n_token_ids} token ids for {row.n_tokens} tokens"


def _site_problems(
    stream: BinaryIO, file: StoredFile, site: str, table: Sequence[TableRow], record: CommitRecord, format_name: str
) -> list[str]:
    """The shard is let go before the next one is read."""
    shard = read_shard(stream, format_name, gzipped=file.name.endswith(".gz"))
    return list(_shard_problems(shard, site, table, record))


def _shard_problems(shard: StoredShard, site: str, table: Sequence[TableRow], record: CommitRecord) -> Iterator[str]:
    if tuple(shard.layers) != record.layers:
        yield f"it holds layers {list(shard.layers)}, the record says {list(record.layers)}"
    if list(shard.sample_idx) != [row.sample_idx for row in table]:
        yield "its samples are not those of the sample table"
        return
    dtype = DTYPES[record.dtype]
    for layer, arrays in shard.layers.items():
        for row, array in zip(table, arrays, strict=True):
            where = f"layer {layer}, sample {row.sample_idx}"
            if array.shape != (row.n_tokens, record.widths[site]):
                yield f"{where}: shape {array.shape} instead of {(row.n_tokens, record.widths[site])}"
            elif array.dtype != dtype:
                yield f"{where}: dtype {array.dtype} instead of {dtype}"
            elif not np.isfinite(array).all():
                yield f"{where}: it holds NaN or infinity"
