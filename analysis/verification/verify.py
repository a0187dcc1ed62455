"""Verifies an output: every file that a commit record names, and that the folders together have each sample once.

Only the bytes count: checksums are recomputed, shards are decoded, arrays are compared with the sample table.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from analysis.verification.stored_identity import (
    StoredRunIdentity,
    StoredStream,
    read_dataset_shards,
    read_object,
    read_run,
    read_stream,
)
from analysis.verification.stream_shares import share_faults
from analysis.verification.window_checks import CheckedWindow, check_window
from core.base.canonical_json import read_sealed_json
from core.base.errors import RunError, UsageError
from core.claims.records import CLAIMS_FOLDER, damaged_claims
from core.commit.identity import StreamIdentity
from core.commit.output_identity import DATASET_FILE, RUN_FILE, STREAM_FILE
from core.commit.record import RECORD_NAME, CommitRecord
from core.commit.stored_records import METADATA_FILE, folder_metadata, read_records
from core.dataset_utils import first_selected
from core.object_store import ObjectStore, open_store
from core.shards.formats import FORMATS
from core.streams.sharded_dataset import SHARD_NAME

# Each thread holds one shard in memory.
_THREADS = 2


@dataclass
class FolderReport:
    """The result for one worker's folder. Any problem makes the whole verification fail; a warning does not."""

    folder: str
    shards: int = 0
    samples: int = 0
    tokens: int = 0
    bytes: int = 0
    lines_done: int = 0
    complete: bool = False
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class VerificationReport:
    """The results for the folders of an output, and the problems and warnings beyond single folders."""

    url: str
    folders: tuple[FolderReport, ...]
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether neither the output nor a folder of it has a problem."""
        return not self.problems and not any(folder.problems for folder in self.folders)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {"ok": self.ok} | asdict(self)

    def lines(self) -> list[str]:
        """The report as lines of text."""
        lines = []
        for report in self.folders:
            state = "complete" if report.complete else "not finished"
            if report.problems:
                state = _count_problems(len(report.problems))
            counts = f"{report.shards} shards, {report.samples} samples, {report.tokens} tokens, {report.bytes} bytes"
            lines.append(f"{report.folder}: {counts}, {state}")
            lines += [f"{report.folder}: PROBLEM: {problem}" for problem in report.problems]
            lines += [f"{report.folder}: note: {warning}" for warning in report.warnings]
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        lines += [f"note: {warning}" for warning in self.warnings]
        return [*lines, self._verdict()]

    def _verdict(self) -> str:
        if self.ok:
            shards, samples, tokens = (
                sum(getattr(f, n) for f in self.folders) for n in ("shards", "samples", "tokens")
            )
            return f"verified: {shards} shards, {samples} samples, {tokens} tokens"
        return _count_problems(len(self.problems) + sum(len(folder.problems) for folder in self.folders))


def _count_problems(count: int) -> str:
    return "1 problem" if count == 1 else f"{count} problems"


def verify(url: str, *, allow_unfinished: bool = False) -> VerificationReport:
    """Verifies the output at `url`: the output folder, or one worker's folder in it, which is then checked alone.

    allow_unfinished: an unfinished stream, and a share or dataset shard that no worker has begun, is a note instead of
    a problem.
    Raises UsageError when there is no run at `url`, RunError when it cannot be listed.
    """
    root, names, only = listed_root(url.rstrip("/"))
    folders = [folder for folder in worker_folders(names) if only in (None, folder)]
    if not folders:
        raise UsageError(f"{url}: no run here: pass the folder with {RUN_FILE}")
    try:
        run_identity = read_run(root)
    except RunError as error:
        return VerificationReport(root.url, (), problems=(str(error),))
    reports = {folder: FolderReport(folder) for folder in folders}
    streams = {}
    for folder, report in reports.items():
        try:
            stream = read_stream(root, folder)
            streams[folder] = stream.stream
            _verify_folder(root, report, run_identity, stream, names, allow_unfinished)
        except RunError as error:
            report.problems.append(str(error))
    if only is not None:
        return VerificationReport(root.url, tuple(reports.values()))
    faults = share_faults(streams)
    problems = [*faults.problems, *([] if allow_unfinished else faults.unfinished)]
    # A missing dataset.json is reported, too: without it missing shards cannot be found.
    if DATASET_FILE in names or any(map(SHARD_NAME.fullmatch, folders)):
        problems += _verify_dataset(root, reports, streams, allow_unfinished)
    notes = [*(faults.unfinished if allow_unfinished else ()), *_claim_notes(root, names)]
    return VerificationReport(root.url, tuple(reports.values()), tuple(problems), tuple(notes))


def listed_root(url: str) -> tuple[ObjectStore, list[str], str | None]:
    """The store of the whole output, its names, and the folder when `url` is that of one worker's folder."""
    store = open_store(url)
    only = None
    try:
        names = store.list()
        if RUN_FILE not in names and STREAM_FILE in names:
            parent, _, only = store.url.rpartition("/")
            store = open_store(parent)
            names = store.list()
    except OSError as error:
        raise RunError(f"{url} cannot be listed: {error.strerror or error}") from error
    return store, names, only


def worker_folders(names: Sequence[str]) -> list[str]:
    """Every folder with a stream.json or a commit record."""
    parts = (name.rpartition("/") for name in names)
    return sorted(
        {folder for folder, _, name in parts if folder and (name == STREAM_FILE or RECORD_NAME.fullmatch(name))}
    )


def _verify_dataset(
    root: ObjectStore, reports: dict[str, FolderReport], streams: Mapping[str, StreamIdentity], allow_unfinished: bool
) -> list[str]:
    """Compares the folders with the shards of dataset.json; adds problems to their reports, and missing reports.

    Returns the problems of dataset.json itself.
    """
    try:
        shards = read_dataset_shards(root)
    except RunError as error:
        return [str(error)]
    for shard, stored in shards.items():
        if shard not in reports:
            report = reports[shard] = FolderReport(shard)
            note = "no worker has begun this shard of the dataset"
            (report.warnings if allow_unfinished else report.problems).append(note)
        elif shard in streams and streams[shard] != stored.stream:
            reports[shard].problems.append(f"{STREAM_FILE} and {DATASET_FILE} disagree about the stream")
        elif reports[shard].complete and reports[shard].lines_done != stored.num_tasks:
            reports[shard].problems.append(
                f"{reports[shard].lines_done} lines are done, {DATASET_FILE} lists {stored.num_tasks}"
            )
    return []


def _claim_notes(root: ObjectStore, names: Sequence[str]) -> list[str]:
    """Notes on damaged claims, which only matter to running workers."""
    return [
        f"{name} is damaged: once no worker runs, remove the folder {CLAIMS_FOLDER}; no committed work is lost"
        for name in damaged_claims(root, names)
    ]


def _verify_folder(
    root: ObjectStore,
    report: FolderReport,
    run_identity: StoredRunIdentity,
    stream: StoredStream,
    names: Sequence[str],
    allow_unfinished: bool,
) -> None:
    """Fills the report; raises RunError when the records of the folder cannot be read."""
    records = _records(root, report.folder)
    report.problems += _foreign_records(
        RUN_FILE, "run", [r.window for r in records if r.plan_hash != run_identity.hash]
    )
    report.problems += _foreign_records(
        STREAM_FILE, "stream", [r.window for r in records if r.stream_hash != stream.hash]
    )
    checked = _check_windows(root, report, records, run_identity.format)
    report.problems += _coverage_problems(records, checked, stream.stream)
    report.complete = bool(records) and records[-1].next_place is None
    if not report.complete:
        where = f"sample {records[-1].next_place.sample_idx}" if records and records[-1].next_place else "the beginning"
        unfinished = f"the stream is not finished: run the same extraction again to continue at {where}"
        (report.warnings if allow_unfinished else report.problems).append(unfinished)
    report.lines_done = sum(len(record.bad_records) for record in records)
    report.lines_done += report.samples // records[0].samples_per_record if records else 0
    report.warnings += _uncommitted_files(report.folder, records, names)
    report.warnings += _metadata_notes(root, report.folder, records)


def _foreign_records(name: str, what: str, windows: Sequence[int]) -> Iterator[str]:
    if windows:
        more = f" and {len(windows) - 1} more" * (len(windows) > 1)
        yield f"window {windows[0]}{more} was written for another {what} than {name}: one of them was changed"


def _records(root: ObjectStore, folder: str) -> list[CommitRecord]:
    try:
        return read_records(root, folder)
    except OSError as error:
        raise RunError(f"{root.url}/{folder}: its records cannot be read: {error}") from error


def _check_windows(
    root: ObjectStore, report: FolderReport, records: Sequence[CommitRecord], format_name: str
) -> list[CheckedWindow]:
    with ThreadPoolExecutor(_THREADS) as pool:
        checked = list(pool.map(lambda record: check_window(root, report.folder, record, format_name), records))
    for record, window in zip(records, checked, strict=True):
        report.problems += [f"window {record.window}: {problem}" for problem in window.problems]
        report.shards += 1
        report.samples += len(window.sample_idx)
        report.tokens += record.n_tokens
        report.bytes += sum(file.bytes for file in record.files)
    return checked


def _coverage_problems(
    records: Sequence[CommitRecord], checked: Sequence[CheckedWindow], stream: StreamIdentity
) -> Iterator[str]:
    """Compares the samples of all windows with those of the stream: each one once, none missing."""
    if not records:
        return
    per_record = records[0].samples_per_record
    bad = {bad["position"] for record in records for bad in record.bad_records}
    start = first_selected(stream.first_position, stream.machine_id, stream.total_machines)
    positions = itertools.count(start, stream.total_machines)
    expected = (
        position * per_record + prediction
        for position in positions
        if position not in bad
        for prediction in range(per_record)
    )
    for record, window in zip(records, checked, strict=True):
        for index in window.sample_idx:
            wanted = next(expected)
            if index != wanted:
                yield f"window {record.window}: found sample {index} instead of {wanted}"
                return


def _uncommitted_files(folder: str, records: Sequence[CommitRecord], names: Sequence[str]) -> Iterator[str]:
    named = {f"{folder}/{file.name}" for record in records for file in record.files}
    suffixes = (".gz", *(shard_format.suffix for shard_format in FORMATS.values()))
    data = [name for name in names if name.startswith(f"{folder}/") and name.endswith(suffixes)]
    stray = [name for name in data if name not in named]
    if stray:
        yield f"{len(stray)} files without a record, {stray[0]} first: a run was stopped before it committed them"


def _metadata_notes(root: ObjectStore, folder: str, records: Sequence[CommitRecord]) -> Iterator[str]:
    try:
        metadata = read_object(root, f"{folder}/{METADATA_FILE}")
        read_sealed_json(root.read_bytes(f"{folder}/{METADATA_FILE}"))
    except RunError as error:
        yield f"{error}: the next run rebuilds it"
        return
    except ValueError as error:
        yield f"{METADATA_FILE}: {error}: the next run rebuilds it"
        return
    if any(metadata.get(key) != value for key, value in folder_metadata(records).items()):
        yield f"{METADATA_FILE} is older than the records: the next run rebuilds it"
