"""Checks an output folder: every file that a commit record names, and that the records cover the stream.

Nothing is believed but the bytes: checksums are recomputed, shards decoded, arrays compared with the sample table.
"""

import io
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from isal import igzip

from core.activation_storage import (
    DATASET_FILE,
    INDEX_FILE,
    RUN_FILE,
    STREAM_FILE,
    CommitRecord,
    StoredFile,
    index_of,
    read_records,
)
from core.dataset_utils import first_selected
from core.errors import RunError, UsageError
from core.formats import DTYPES, FORMATS, StoredShard
from core.object_store import ObjectStore, open_store
from core.plan import content_hash
from core.sinks import digest_stream

# Each thread holds one shard in memory.
_THREADS = 2


@dataclass
class FolderReport:
    """What was found in one worker's folder. Any problem makes the whole verification fail; a warning does not."""

    folder: str
    shards: int = 0
    samples: int = 0
    tokens: int = 0
    bytes: int = 0
    complete: bool = False
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class VerificationReport:
    """The folders of an output and whether all is well."""

    url: str
    folders: tuple[FolderReport, ...]

    @property
    def ok(self) -> bool:
        """Whether no folder has a problem."""
        return not any(folder.problems for folder in self.folders)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {"ok": self.ok, "url": self.url, "folders": [asdict(folder) for folder in self.folders]}

    def lines(self) -> list[str]:
        """The report for people."""
        lines = []
        for report in self.folders:
            state = "complete" if report.complete else "not finished"
            counts = f"{report.shards} shards, {report.samples} samples, {report.tokens} tokens, {report.bytes} bytes"
            lines.append(f"{report.folder}: {counts}, {state}")
            lines += [f"{report.folder}: PROBLEM: {problem}" for problem in report.problems]
            lines += [f"{report.folder}: note: {warning}" for warning in report.warnings]
        return [*lines, "all is well" if self.ok else "NOT all is well"]


def verify(url: str, *, allow_unfinished: bool = False) -> VerificationReport:
    """Checks the output at `url` (the output folder, or one worker's folder in it).

    allow_unfinished: a stream that is not covered to its end is a note instead of a problem.
    Raises UsageError when there is no run at `url`.
    """
    root, only = _root_of(url.rstrip("/"))
    names = root.list()
    folders = sorted({name.rpartition("/")[0] for name in names if name.endswith(f"/{STREAM_FILE}")})
    folders = [folder for folder in folders if only in (None, folder)]
    if not folders:
        raise UsageError(f"{url}: no run here: name the folder that holds {RUN_FILE}")
    run_plan = _read_json(root, RUN_FILE)
    reports = [_verify_folder(root, folder, run_plan, names, allow_unfinished) for folder in folders]
    if only is None and DATASET_FILE in names:
        reports += _missing_shards(root, folders, allow_unfinished)
    return VerificationReport(root.url, tuple(reports))


def _missing_shards(root: ObjectStore, folders: Sequence[str], allow_unfinished: bool) -> Iterator[FolderReport]:
    """A report for each shard of the dataset that has no folder yet, or whose folder is for another stream."""
    for shard, stream in _read_json(root, DATASET_FILE)["shards"].items():
        if shard not in folders:
            note = ["no worker has begun this shard of the dataset"]
            yield FolderReport(shard, warnings=note) if allow_unfinished else FolderReport(shard, problems=note)
        elif _read_json(root, f"{shard}/{STREAM_FILE}") != stream:
            yield FolderReport(shard, problems=[f"{STREAM_FILE} and {DATASET_FILE} disagree about the stream"])


def _root_of(url: str) -> tuple[ObjectStore, str | None]:
    """The store of the whole output, and the one folder that is meant when `url` names it."""
    store = open_store(url)
    if store.info(RUN_FILE) is None and store.info(STREAM_FILE) is not None:
        parent, _, folder = store.url.rpartition("/")
        return open_store(parent), folder
    return store, None


def _read_json(store: ObjectStore, name: str) -> dict[str, Any]:
    try:
        return json.loads(store.read_bytes(name))
    except FileNotFoundError as error:
        raise RunError(f"{store.url}/{name} is missing") from error
    except ValueError as error:
        raise RunError(f"{store.url}/{name} is not JSON: {error}") from error


def _verify_folder(
    root: ObjectStore, folder: str, run_plan: dict[str, Any], names: Sequence[str], allow_unfinished: bool
) -> FolderReport:
    report = FolderReport(folder)
    try:
        stream = _read_json(root, f"{folder}/{STREAM_FILE}")
        records = read_records(root, folder)
    except RunError as error:
        report.problems.append(str(error))
        return report
    hashes = (content_hash(run_plan), content_hash(stream))
    report.problems += [
        f"window {record.window} was written for another plan or stream than {RUN_FILE} and {STREAM_FILE} say"
        for record in records
        if (record.plan_hash, record.stream_hash) != hashes
    ]
    with ThreadPoolExecutor(_THREADS) as pool:
        checked = list(pool.map(lambda record: _verify_window(root, folder, record, run_plan), records))
    for record, (sample_idx, problems) in zip(records, checked, strict=True):
        report.problems += [f"window {record.window}: {problem}" for problem in problems]
        report.shards += 1
        report.samples += len(sample_idx)
        report.tokens += record.n_tokens
        report.bytes += sum(file.bytes for file in record.files)
    report.problems += _coverage_problems(records, [sample_idx for sample_idx, _ in checked], stream)
    report.complete = bool(records) and records[-1].next_place is None
    if not report.complete:
        where = f"sample {records[-1].next_place.sample_idx}" if records and records[-1].next_place else "the beginning"
        unfinished = f"the stream is not finished: the run goes on at {where}"
        (report.warnings if allow_unfinished else report.problems).append(unfinished)
    report.warnings += _stray_files(folder, records, names)
    report.warnings += _index_notes(root, folder, records)
    return report


def _verify_window(
    root: ObjectStore, folder: str, record: CommitRecord, run_plan: dict[str, Any]
) -> tuple[list[int], list[str]]:
    """The sample indices of a window by its table, and what is wrong with its files."""
    problems: list[str] = []
    table: list[dict[str, Any]] = []
    for file in sorted(record.files, key=lambda file: file.site is not None):
        data = _checked_bytes(root, folder, file, problems)
        if data is None:
            continue
        try:
            if file.site is None:
                table = [json.loads(line) for line in igzip.decompress(data).splitlines()]
                problems += [f"{file.name}: {problem}" for problem in _table_problems(table, record)]
            else:
                shard = decode_shard(data, file.name, run_plan["format"])
                problems += [f"{file.name}: {problem}" for problem in _shard_problems(shard, file.site, table, record)]
        except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
            problems.append(f"{file.name}: cannot be read: {error}")
    return [row["sample_idx"] for row in table], problems


def decode_shard(data: bytes, name: str, format_name: str) -> StoredShard:
    """The arrays of a shard file; raises ValueError saying what is wrong with it."""
    raw = igzip.open(io.BytesIO(data)) if name.endswith(".gz") else io.BytesIO(data)
    return FORMATS[format_name].read(raw)


def _checked_bytes(root: ObjectStore, folder: str, file: StoredFile, problems: list[str]) -> bytes | None:
    try:
        data = root.read_bytes(f"{folder}/{file.name}")
    except FileNotFoundError:
        problems.append(f"{file.name} is missing")
        return None
    except RunError as error:
        problems.append(f"{file.name}: {error}")
        return None
    digest = digest_stream(io.BytesIO(data))
    for what in ("bytes", "crc32c", "sha256"):
        found, recorded = getattr(digest, what), getattr(file, what)
        if found != recorded:
            problems.append(f"{file.name}: {what} is {found}, its record says {recorded}")
            return None
    return data


def _table_problems(table: list[dict[str, Any]], record: CommitRecord) -> Iterator[str]:
    if len(table) != record.n_samples:
        yield f"it lists {len(table)} samples, the record says {record.n_samples}"
    if sum(row["n_tokens"] for row in table) != record.n_tokens:
        yield f"its samples have {sum(row['n_tokens'] for row in table)} tokens, the record says {record.n_tokens}"
    for row in table:
        if len(row["token_ids"]) != row["n_tokens"]:
            yield f"sample {row['sample_idx']} has {len(row['token_ids'])} token ids for {row['n_tokens']} tokens"


def _shard_problems(shard: StoredShard, site: str, table: list[dict[str, Any]], record: CommitRecord) -> Iterator[str]:
    if tuple(shard.layers) != record.layers:
        yield f"it holds layers {list(shard.layers)}, the record says {list(record.layers)}"
    if list(shard.sample_idx) != [row["sample_idx"] for row in table]:
        yield "its samples are not those of the sample table"
        return
    dtype = DTYPES[record.dtype]
    for layer, arrays in shard.layers.items():
        for row, array in zip(table, arrays, strict=True):
            where = f"layer {layer}, sample {row['sample_idx']}"
            if array.shape != (row["n_tokens"], record.widths[site]):
                yield f"{where}: shape {array.shape} instead of {(row['n_tokens'], record.widths[site])}"
            elif array.dtype != dtype:
                yield f"{where}: dtype {array.dtype} instead of {dtype}"
            elif not np.isfinite(array).all():
                yield f"{where}: it holds NaN or infinity"


def _coverage_problems(
    records: Sequence[CommitRecord], sample_idx: Sequence[list[int]], stream: dict[str, Any]
) -> Iterator[str]:
    """Compares the samples of all windows with what the stream must give: each one once, none left out."""
    if not records:
        return
    per_record = records[0].samples_per_record
    bad = {bad["position"] for record in records for bad in record.bad_records}
    start = first_selected(stream.get("first_position", 0), stream["machine_id"], stream["total_machines"])
    positions = itertools.count(start, stream["total_machines"])
    expected = (
        position * per_record + prediction
        for position in positions
        if position not in bad
        for prediction in range(per_record)
    )
    for record, found in zip(records, sample_idx, strict=True):
        for index in found:
            wanted = next(expected)
            if index != wanted:
                yield f"window {record.window}: sample {index} stands where sample {wanted} belongs"
                return


def _stray_files(folder: str, records: Sequence[CommitRecord], names: Sequence[str]) -> Iterator[str]:
    named = {f"{folder}/{file.name}" for record in records for file in record.files}
    suffixes = (".gz", *(shard_format.suffix() for shard_format in FORMATS.values()))
    data = [name for name in names if name.startswith(f"{folder}/") and name.endswith(suffixes)]
    stray = [name for name in data if name not in named]
    if stray:
        yield f"{len(stray)} files that no record names, {stray[0]} first: a run was stopped before it committed them"


def _index_notes(root: ObjectStore, folder: str, records: Sequence[CommitRecord]) -> Iterator[str]:
    try:
        index = _read_json(root, f"{folder}/{INDEX_FILE}")
    except RunError as error:
        yield f"{error}: the next run rebuilds it"
        return
    if any(index.get(key) != value for key, value in index_of(records).items()):
        yield f"{INDEX_FILE} is behind the records: the next run rebuilds it"
