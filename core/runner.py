"""One run from flags to summary: set up, check, plan or extract, report."""

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import jax
from absl import logging

from core.jax_utils import enable_compilation_cache, join_hosts, resolve_compute_dtype
from core.job import Job, open_storage, open_stores, prepare_job, prepare_shard_jobs
from core.planning import PlanReport, plan_run
from core.progress import Summary
from core.run_config import RunConfig
from core.sharded_run import run_shards, windows_of
from core.signals import stop_on_signals
from core.stream_run import load, prepare_stream, run_stream
from core.windows import Window

# malloc.h
_M_ARENA_MAX = -8
_M_MMAP_THRESHOLD = -3


def run(config: RunConfig) -> Summary | PlanReport:
    """Runs (or with `config.plan` prices) one worker's extraction. Raises RunError, UsageError or ModelError."""
    _keep_heap_flat()
    config = _join_hosts(config)
    enable_compilation_cache(config.compilation_cache_dir)
    compute_dtype = resolve_compute_dtype(config.compute_dtype)
    if config.gcs_bucket is not None and not config.uploads:
        logging.warning("--gcs_bucket %s is not used without --upload_to_gcs", config.gcs_bucket)
    if config.use_sharded_dataset:
        jobs = prepare_shard_jobs(config, compute_dtype)
        return _plan(jobs[0], windows_of(jobs)) if config.plan else run_shards(jobs, open_stores(config))
    job = prepare_job(config, compute_dtype)
    return _plan(job, job.windows()) if config.plan else _extract(job)


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


def _plan(job: Job, windows: Iterator[Window]) -> PlanReport:
    free = open_stores(job.config).spool.free_bytes()
    return plan_run(job, windows, load(job).step, job.batch_shape(jax.local_device_count()), free)


def _extract(job: Job) -> Summary:
    storage = open_storage(job)
    storage.spool.remove_stale_temporaries()
    prepared = prepare_stream(job, storage)
    model = load(job) if prepared.windows is not None else None
    with stop_on_signals() as stop:
        return run_stream(prepared, model, stop)
