"""One run from flags to summary: set up, check, plan or extract, report."""

import ctypes
import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from absl import logging

from core.errors import UsageError
from core.extraction import is_complete, resume_place
from core.jax_utils import enable_compilation_cache, join_hosts
from core.job import Job, backend_of, open_storage, open_stores, prepare_job, prepare_shard_jobs
from core.planning import PlanReport, plan_run
from core.progress import Summary
from core.run_config import RunConfig
from core.sharded_run import BeforeExtraction, run_shards
from core.signals import stop_on_signals
from core.stream_run import load, prepare_stream, run_stream

# malloc.h
_M_ARENA_MAX = -8
_M_MMAP_THRESHOLD = -3


def run(config: RunConfig, before_extraction: BeforeExtraction | None = None) -> Summary | PlanReport:
    """Runs (or with `config.plan` prices) one worker's extraction. Raises RunError, UsageError or ModelError.

    before_extraction: called once with the (first) job and its stores when there is something left to extract, before
    anything is written or loaded. What it raises ends the run.
    """
    _keep_heap_flat()
    backend = backend_of(config)
    if backend.name == "jax":
        config = _join_hosts(config)
        enable_compilation_cache(config.compilation_cache_dir)
    elif config.multihost:
        raise UsageError("--multihost: JAX joins hosts, torch does not: use --machine_id and --total_machines")
    compute_dtype = backend.compute_dtype(config.compute_dtype)
    if config.gcs_bucket is not None and not config.uploads:
        logging.warning("--gcs_bucket %s is not used without --upload_to_gcs", config.gcs_bucket)
    if config.use_sharded_dataset:
        jobs = prepare_shard_jobs(config, compute_dtype)
        return _plan(jobs) if config.plan else run_shards(jobs, open_stores(config), before_extraction)
    job = prepare_job(config, compute_dtype)
    return _plan([job]) if config.plan else _extract(job, before_extraction)


def _keep_heap_flat() -> None:
    """Has glibc give large arrays back to the system, and share two heaps among all threads.

    Left to itself it gives every thread a heap of its own and keeps freed arrays in them, where they fragment: a long
    run would hold on to ever more. Other C libraries are left alone.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_ARENA_MAX, 2)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _join_hosts(config: RunConfig) -> RunConfig:
    """With --multihost every host takes its share of the stream's lines and a folder of its own, or claims shards."""
    if not config.multihost:
        return config
    hosts, host = join_hosts(config.coordinator_address, config.num_hosts, config.host_id)
    config = replace(config, worker_id=config.worker_id * hosts + host)
    if config.use_sharded_dataset:
        return config
    return replace(config, total_machines=config.total_machines * hosts, machine_id=config.machine_id * hosts + host)


def _plan(jobs: Sequence[Job]) -> PlanReport:
    """Prices what the output does not hold yet."""
    stores = open_stores(jobs[0].config)
    done = [(job, open_storage(job, stores).open()) for job in jobs]
    left = ((job, resume_place(records)) for job, records in done if not is_complete(records))
    windows = (job.windows(start=place, first_index=i, bad_before=bad) for job, (place, i, bad) in left)
    return plan_run(
        jobs[0],
        itertools.chain.from_iterable(windows),
        lambda: load(jobs[0]).step,
        committed=[record for _, records in done for record in records],
        free=stores.spool.free_bytes(),
    )


def _extract(job: Job, before_extraction: BeforeExtraction | None) -> Summary:
    stores = open_stores(job.config)
    storage = open_storage(job, stores)
    storage.spool.remove_stale_temporaries()
    prepared = prepare_stream(job, storage)
    if before_extraction is not None and prepared.windows is not None:
        before_extraction(job, stores)
    model = load(job) if prepared.windows is not None else None
    with stop_on_signals(job.config.stop_grace_s) as stop:
        return run_stream(prepared, model, stop)
