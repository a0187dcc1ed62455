"""Verifies an output: every file that a commit record names, and that the folders together have each sample once.

Only the bytes count: checksums are recomputed, shards are decoded, arrays are compared with the sample table.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from analysis.passes import PartialStore, RunnerChoice
from analysis.verification.report import FolderReport, VerificationReport
from analysis.verification.stored_identity import (
    StoredRunIdentity,
    StoredStream,
    read_dataset_shards,
    read_object,
    read_run,
    read_stream,
)
from analysis.verification.stream_shares import share_faults
from analysis.verification.window_checks import CheckedWindow
from analysis.verification.windows_pass import CommittedWindow, check_windows
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
DEFAULT_RUNNER = RunnerChoice("threads", 2)


def verify(
    url: str,
    *,
    allow_unfinished: bool = False,
    runner: RunnerChoice = DEFAULT_RUNNER,
    partials: PartialStore | None = None,
) -> VerificationReport:
    """Verifies the output at `url`: the output folder, or one worker's folder in it, which is then checked alone.

    Args:
      allow_unfinished: an unfinished stream, and a share or dataset shard that no worker has begun, is a note instead
        of a problem.
      runner: where windows are read and checked. partials: what an interrupted verification found is not read again.

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
    found = [_FoundFolder.read(root, folder, run_identity) for folder in folders]
    _check_folders(root, found, run_identity.format, names, allow_unfinished, (runner, partials))
    reports = {each.folder: each.report for each in found}
    streams = {each.folder: each.stream.stream for each in found if each.stream is not None}
    if only is not None:
        return VerificationReport(root.url, tuple(reports.values()))
    problems, notes = _common_problems(root, names, reports, streams, allow_unfinished)
    return VerificationReport(root.url, tuple(reports.values()), tuple(problems), tuple(notes))


def _common_problems(
    root: ObjectStore,
    names: Sequence[str],
    reports: dict[str, FolderReport],
    streams: Mapping[str, StreamIdentity],
    allow_unfinished: bool,
) -> tuple[list[str], list[str]]:
    """Problems and notes beyond single folders; adds what concerns one to its report, and missing reports."""
    faults = share_faults(streams)
    problems = [*faults.problems, *([] if allow_unfinished else faults.unfinished)]
    # A missing dataset.json is reported, too: without it missing shards cannot be found.
    if DATASET_FILE in names or any(map(SHARD_NAME.fullmatch, reports)):
        problems += _verify_dataset(root, reports, streams, allow_unfinished)
    return problems, [*(faults.unfinished if allow_unfinished else ()), *_claim_notes(root, names)]


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


@dataclass(frozen=True)
class _FoundFolder:
    """A folder before its windows are checked. stream: None if it cannot be read; records: empty if they cannot."""

    report: FolderReport
    stream: StoredStream | None = None
    records: tuple[CommitRecord, ...] = ()
    is_readable: bool = False

    @property
    def folder(self) -> str:
        """Its name."""
        return self.report.folder

    @classmethod
    def read(cls, root: ObjectStore, folder: str, run_identity: StoredRunIdentity) -> "_FoundFolder":
        """Reads the stream and the records; what cannot be read is a problem of the report."""
        report, stream = FolderReport(folder), None
        try:
            stream = read_stream(root, folder)
            records = tuple(_records(root, folder))
        except RunError as error:
            report.problems.append(str(error))
            return cls(report, stream)
        foreign = [record.window for record in records if record.plan_hash != run_identity.hash]
        report.problems += _foreign_records(RUN_FILE, "run", foreign)
        foreign = [record.window for record in records if record.stream_hash != stream.hash]
        report.problems += _foreign_records(STREAM_FILE, "stream", foreign)
        return cls(report, stream, records, is_readable=True)


def _check_folders(
    root: ObjectStore,
    found: Sequence[_FoundFolder],
    format_name: str,
    names: Sequence[str],
    allow_unfinished: bool,
    where: tuple[RunnerChoice, PartialStore | None],
) -> None:
    """Checks the windows of all folders in one pass, and fills the reports."""
    windows = [CommittedWindow(root.url, each.folder, record, format_name) for each in found for record in each.records]
    checked = iter(check_windows(windows, *where))
    for each in found:
        own = list(itertools.islice(checked, len(each.records)))
        try:
            if each.stream is not None and each.is_readable:
                _check_folder(root, each, each.stream, own, names, allow_unfinished)
        except RunError as error:
            each.report.problems.append(str(error))


def _check_folder(
    root: ObjectStore,
    found: _FoundFolder,
    stream: StoredStream,
    checked: Sequence[CheckedWindow],
    names: Sequence[str],
    allow_unfinished: bool,
) -> None:
    """Fills the report of a folder with what was found in its windows, and what these are together."""
    report, records = found.report, found.records
    _count_windows(report, records, checked)
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


def _count_windows(report: FolderReport, records: Sequence[CommitRecord], checked: Sequence[CheckedWindow]) -> None:
    for record, window in zip(records, checked, strict=True):
        report.problems += [f"window {record.window}: {problem}" for problem in window.problems]
        report.shards += 1
        report.samples += len(window.sample_idx)
        report.tokens += record.n_tokens
        report.bytes += sum(file.bytes for file in record.files)


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
