"""Extracts one stream or dataset shard, from the last committed window to its end."""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from absl import logging

from core.activation_storage import ActivationStorage
from core.base.dtypes import DTYPES
from core.commit.checkpoint import WorkerCheckpoint, save_checkpoint
from core.commit.record import CommitRecord
from core.hosts.session import HostSession
from core.object_store import LocalStore, disk_errors
from core.reduce.reducer import Reducer
from core.run.extraction import Extraction, is_complete, resume_place
from core.run.job import Job
from core.run.pipeline import Pipeline
from core.run.progress import Progress, Summary
from core.run.survey import Survey, check_disk_space, survey_stream
from core.samples.windows import Window
from core.shards.encoding import ShardEncoder
from core.shards.formats import FORMATS
from core.step.backend import Step

# metadata.json may be this old; GCS accepts about one write per second for one name.
_METADATA_EVERY_S = 30.0


@dataclass(frozen=True)
class LoadedStep:
    """The model on the device, how long it took to get there, and what is done to what its steps give."""

    step: Step
    seconds: float
    reduce: Reducer | None = None


@dataclass(frozen=True)
class PreparedStream:
    """A stream whose folder has been opened and whose first window has been read, in `read_seconds`.

    windows: None when the stream is complete, or when it `is_empty`: without a sample for this folder, which must still
    be committed.
    first_shape: (rows, length) of its first step.
    """

    job: Job
    storage: ActivationStorage
    survey: Survey
    windows: Iterator[Window] | None
    read_seconds: float = 0.0
    first_shape: tuple[int, int] | None = None
    is_empty: bool = False


def load(job: Job, first_shape: tuple[int, int] | None = None) -> LoadedStep:
    """Loads the layers of the model that the job captures, on all devices of this process.

    first_shape: (rows, length) of the first step, which is compiled meanwhile; None: a full one.
    """
    started = time.monotonic()
    full = job.batch_shape.rows_per_step, job.batch_shape.row_lengths[-1]
    request = replace(job.step_request, first_shape=first_shape or full)
    step = job.backend.load(job.config.model_path, job.config.revision, request)
    reduce = None if job.reduction is None else Reducer(job.reduction, DTYPES[job.config.dtype])
    return LoadedStep(step, time.monotonic() - started, reduce)


def prepare_stream(
    job: Job, storage: ActivationStorage, broadcast: Callable[[str, Callable[[], Any]], Any] | None = None
) -> PreparedStream:
    """Finds what is left to do; raises RunError when the stream starts with a bad record or the disk is too small.

    broadcast: sends a result of host 0 to all hosts: `Hosts.broadcast` (None) or `HostSession.broadcast`.
    """
    records = _open(job, storage, broadcast or job.hosts.broadcast)
    storage.spool.remove_stale_temporaries(storage.folder)
    survey = survey_stream(job)
    if is_complete(records):
        logging.info("%s is complete: nothing to do", storage.url)
        return PreparedStream(job, storage, survey, None)
    check_disk_space(job, survey, storage.committed_bytes, storage.spool.free_bytes())
    place, index, bad_before = resume_place(records)
    if place is not None:
        logging.info("%s: continuing at sample %d: %d shards are committed", job.folder, place.sample_idx, len(records))
    windows = job.windows(start=place, first_index=index, bad_before=bad_before)
    # A bad first record must be reported before seconds are spent on loading weights.
    started = time.monotonic()
    first = next(windows, None)
    read_seconds = time.monotonic() - started
    _require_writable(job, storage)
    if first is None:
        logging.info("%s: the stream has no line for this machine", storage.url)
        return PreparedStream(job, storage, survey, None, read_seconds, is_empty=True)
    layout = job.layouts_of(next(job.parts_of(first)))[0]
    shape = layout.n_rows, layout.length
    return PreparedStream(job, storage, survey, itertools.chain([first], windows), read_seconds, first_shape=shape)


def _open(
    job: Job, storage: ActivationStorage, broadcast: Callable[[str, Callable[[], Any]], Any]
) -> list[CommitRecord]:
    """The committed records. Host 0 reads first, so that the others find all of its records, and perhaps more."""
    if job.hosts.is_first:
        records = storage.open()
        broadcast("found", lambda: len(records))
        return records
    return storage.open(broadcast("found", lambda: None))


def _require_writable(job: Job, storage: ActivationStorage) -> None:
    """Raises RunError naming a folder that cannot be written: before weights are loaded, not at the first commit."""
    folders = [storage.spool]
    if job.config.enable_checkpointing:
        folders.append(LocalStore(job.config.checkpoint_dir))
    for folder in folders:
        with disk_errors(folder.root):
            probe = folder.temporary_path("probe")
            probe.touch()
            probe.unlink()


def run_stream(
    prepared: PreparedStream,
    model: LoadedStep | None,
    session: HostSession,
    *,
    log: Callable[[str], None] = logging.info,
    on_start: Callable[[Progress], None] | None = None,
    may_write_metadata: Callable[[], bool] = lambda: True,
) -> Summary:
    """Extracts what is left, until the end or until `session.stop` is set.

    Args:
      on_start: called with the progress counters when the run starts.
      may_write_metadata: called before metadata.json is replaced: False when another worker has taken the folder over.
    """
    job, storage = prepared.job, prepared.storage
    pipeline = Pipeline()
    pipeline.clock("read").add_busy(prepared.read_seconds)
    progress = Progress(
        pipeline,
        expected_samples=prepared.survey.samples,
        committed_samples=storage.committed_samples,
        log=log,
        metrics_path=job.config.metrics_path_of(job.folder, job.hosts.host_id),
        n_hosts=min(job.hosts.count, job.identity.parts),
        is_shown=job.hosts.is_first,
    )
    if on_start is not None:
        on_start(progress)
    bookkeeper = _Bookkeeper(job, storage, may_write_metadata)
    with progress:
        if prepared.is_empty:
            storage.commit_empty()
        if prepared.windows is not None and model is not None:
            with ThreadPoolExecutor(os.cpu_count(), "compress") as compressors:
                Extraction(
                    job=job,
                    storage=storage,
                    step=model.step,
                    reduce=model.reduce,
                    encoder=_encoder(job, storage, compressors),
                    progress=progress,
                    pipeline=pipeline,
                    session=session,
                    on_commit=bookkeeper.committed,
                ).run(prepared.windows)
        status = bookkeeper.finish()
    return progress.summary(
        status=status,
        output=storage.url,
        total_samples=storage.committed_samples,
        total_shards=storage.committed_shards,
        load_seconds=round(model.seconds, 3) if model is not None else 0.0,
    )


def _encoder(job: Job, storage: ActivationStorage, compressors: ThreadPoolExecutor) -> ShardEncoder:
    config = job.config
    fmt, syncs = FORMATS[config.format], config.local_copy_stays
    return ShardEncoder(fmt, config.gzipped, storage.spool, job.folder, compressors, syncs)


class _Bookkeeper:
    """Keeps derived files up to date: the checkpoint after every commit, metadata.json every `_METADATA_EVERY_S`."""

    def __init__(self, job: Job, storage: ActivationStorage, may_write_metadata: Callable[[], bool]) -> None:
        self._job = job
        self._storage = storage
        self._may_write_metadata = may_write_metadata
        self._metadata_written_at = time.monotonic()

    def committed(self, record: CommitRecord) -> None:
        self._save_checkpoint(record, "running")
        if time.monotonic() - self._metadata_written_at >= _METADATA_EVERY_S:
            self._write_metadata()

    def finish(self) -> str:
        """Writes all derived files; returns "complete" or "stopped"."""
        last = self._storage.last_record
        status = "complete" if last is not None and last.next_place is None else "stopped"
        if last is not None:
            self._write_metadata()
            self._save_checkpoint(last, status)
        return status

    def _write_metadata(self) -> None:
        if self._job.hosts.is_first and self._may_write_metadata():
            self._storage.write_metadata()
            self._metadata_written_at = time.monotonic()

    def _save_checkpoint(self, record: CommitRecord, status: str) -> None:
        config = self._job.config
        if config.enable_checkpointing and self._job.hosts.is_first:
            checkpoint = WorkerCheckpoint(
                worker_id=config.worker_id,
                last_processed_sample_idx=record.last_sample_idx,
                total_samples_processed=self._storage.committed_samples,
                total_shards=self._storage.committed_shards,
                dataset_path=self._job.stream_path,
                model_path=config.model_path,
                status=status,
            )
            save_checkpoint(config.checkpoint_dir, checkpoint)
