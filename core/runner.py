"""One run from flags to summary: set up, check, plan or extract, report."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import jax
from absl import logging

from core.activation_storage import ActivationStorage, CommitRecord
from core.checkpoint import Checkpoint, save_checkpoint
from core.extraction import Extraction, is_complete, resume_place
from core.formats import FORMATS
from core.jax_utils import (
    COMPUTE_DTYPES,
    ExtractionStep,
    data_mesh,
    enable_compilation_cache,
    initialize_distributed,
    resolve_compute_dtype,
)
from core.job import Job, open_storage, prepare_job
from core.pipeline import Pipeline
from core.planning import PlanReport, Survey, plan_run, refuse_full_disk, survey_stream
from core.progress import Progress, Summary
from core.run_config import RunConfig
from core.shard_encoding import ShardEncoder
from core.windows import Window
from qwen2_jax import load_model

# A reader of metadata.json may be that much behind; GCS takes about one write a second for one name.
_INDEX_EVERY_S = 30.0


def run(config: RunConfig) -> Summary | PlanReport:
    """Runs (or with `config.plan` prices) one worker's extraction. Raises RunError, UsageError or ModelError."""
    config = _join_hosts(config)
    enable_compilation_cache(config.compilation_cache_dir)
    job = prepare_job(config, resolve_compute_dtype(config.compute_dtype))
    storage = open_storage(job)
    if config.plan:
        step = _load_step(job)
        return plan_run(job, step, job.batch_shape(jax.local_device_count()), storage.spool.free_bytes())
    return _extract(job, storage)


def _join_hosts(config: RunConfig) -> RunConfig:
    """With --multihost every host takes its share of the stream's lines and a folder of its own."""
    if not config.multihost:
        return config
    initialize_distributed(config.coordinator_address, config.num_hosts, config.host_id)
    hosts, host = jax.process_count(), jax.process_index()
    return replace(
        config,
        total_machines=config.total_machines * hosts,
        machine_id=config.machine_id * hosts + host,
        worker_id=config.worker_id * hosts + host,
    )


def _extract(job: Job, storage: ActivationStorage) -> Summary:
    records = storage.open()
    storage.spool.remove_stale_temporaries()
    survey = survey_stream(job)
    if is_complete(records):
        logging.info("%s is complete: nothing to do", storage.url)
        return _run_stages(job, storage, survey, None)
    refuse_full_disk(job, survey, storage.committed_bytes, storage.spool.free_bytes())
    place, index, bad_before = resume_place(records)
    if place is not None:
        logging.info("going on at sample %d: %d shards are committed", place.sample_idx, len(records))
    windows = job.windows(start=place, first_index=index, bad_before=bad_before)
    # A stream that is bad from the start is refused before seconds are spent on the weights.
    first = next(windows)
    return _run_stages(job, storage, survey, itertools.chain([first], windows))


def _run_stages(job: Job, storage: ActivationStorage, survey: Survey, windows: Iterator[Window] | None) -> Summary:
    config = job.config
    load_started = time.monotonic()
    step = _load_step(job) if windows is not None else None
    load_seconds = time.monotonic() - load_started
    pipeline = Pipeline()
    progress = Progress(
        pipeline,
        expected_samples=survey.samples,
        committed_samples=storage.committed_samples,
        log=logging.info,
        metrics_path=config.metrics_path,
    )
    bookkeeper = _Bookkeeper(job, storage)
    with stop_on_signals() as stop, progress:
        if windows is not None and step is not None:
            with ThreadPoolExecutor(os.cpu_count(), "compress") as compressors:
                Extraction(
                    job=job,
                    storage=storage,
                    step=step,
                    shape=job.batch_shape(jax.local_device_count()),
                    encoder=ShardEncoder(
                        FORMATS[config.format], config.gzipped, storage.spool, config.folder, compressors
                    ),
                    progress=progress,
                    pipeline=pipeline,
                    stop=stop,
                    on_commit=bookkeeper.committed,
                ).run(windows)
        status = bookkeeper.finish()
    return progress.summary(
        status=status,
        output=storage.url,
        total_samples=storage.committed_samples,
        total_shards=storage.committed_shards,
        load_seconds=round(load_seconds, 3),
    )


def _load_step(job: Job) -> ExtractionStep:
    mesh = data_mesh()
    model = load_model(
        job.config.model_path,
        dtype=COMPUTE_DTYPES[job.compute_dtype],
        revision=job.config.revision,
        mesh=mesh,
        n_layers=job.capture.layers[-1] + 1,
        with_head=False,
    )
    return ExtractionStep(model, job.capture, job.config.dtype, mesh)


class _Bookkeeper:
    """Keeps the derived files up to date: the checkpoint after every commit, the index now and then."""

    def __init__(self, job: Job, storage: ActivationStorage) -> None:
        self._job = job
        self._storage = storage
        self._index_written = time.monotonic()

    def committed(self, record: CommitRecord) -> None:
        self._save_checkpoint(record, "running")
        if time.monotonic() - self._index_written >= _INDEX_EVERY_S:
            self._storage.write_index()
            self._index_written = time.monotonic()

    def finish(self) -> str:
        """Brings everything up to date; returns "complete" or "stopped"."""
        last = self._storage.last_record
        status = "complete" if last is not None and last.next_place is None else "stopped"
        if last is not None:
            self._storage.write_index()
            self._save_checkpoint(last, status)
        return status

    def _save_checkpoint(self, record: CommitRecord, status: str) -> None:
        config = self._job.config
        if config.enable_checkpointing:
            checkpoint = Checkpoint(
                worker_id=config.worker_id,
                last_processed_sample_idx=record.last_sample_idx,
                total_samples_processed=self._storage.committed_samples,
                total_shards=self._storage.committed_shards,
                dataset_path=self._job.stream_path,
                model_path=config.model_path,
                status=status,
            )
            save_checkpoint(config.checkpoint_dir, checkpoint)


@contextmanager
def stop_on_signals(on_stop: Callable[[str], None] = logging.warning) -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets: the run ends after what it can commit. A second Ctrl-C ends it at once."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        on_stop(f"{signal.Signals(number).name}: committing what is computed, then stopping")

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
