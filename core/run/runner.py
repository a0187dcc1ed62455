"""One run from flags to summary: set up, check, plan or extract, report."""

import ctypes
import itertools
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from absl import logging

from core.base.errors import UsageError
from core.commit.identity import differing_fields
from core.hosts.pod_slice import ALONE, Hosts, join_hosts
from core.hosts.session import HostSession, StopOfAny
from core.jax_utils import enable_compilation_cache
from core.pricing.plan import PlanReport, plan_run
from core.run.config import RunConfig
from core.run.extraction import is_complete, resume_place
from core.run.job import (
    Job,
    backend_of,
    open_storage,
    open_stores,
    prepare_job,
    prepare_shard_jobs,
    require_shared_output,
)
from core.run.progress import HostEnd, Summary
from core.run.sharded_run import BeforeExtraction, run_shards
from core.run.signals import stop_on_signals
from core.run.stream_run import load, prepare_stream, run_stream

if TYPE_CHECKING:
    from core.pricing.tpu_estimate import StepEstimate

_NOT_WITH_TORCH = "--multihost: JAX joins hosts, torch does not: use --machine_id and --total_machines"
# malloc.h
_M_ARENA_MAX = -8
_M_MMAP_THRESHOLD = -3


def run(
    config: RunConfig, before_extraction: BeforeExtraction | None = None
) -> "Summary | PlanReport | StepEstimate | HostEnd":
    """Runs (or with `config.plan` prices) one worker's extraction. Raises RunError, UsageError or ModelError.

    Of the hosts of a slice the first one gets the report.

    before_extraction: called once with the (first) job and its stores when there is something left to extract, before
    anything is written or loaded. What it raises ends the run.
    """
    if config.tpu_topology is not None:
        from core.pricing.tpu_estimate import estimate_run

        return estimate_run(config, config.tpu_topology)
    _keep_heap_flat()
    if config.gcs_bucket is not None and not config.uploads:
        logging.warning("--gcs_bucket %s is not used without --upload_to_gcs", config.gcs_bucket)
    if config.multihost and config.backend == "torch":
        raise UsageError(_NOT_WITH_TORCH)
    # What fails behind this is told on all hosts.
    with _join_hosts(config) as hosts:
        _require_same_flags(config, hosts)
        report = _run(config, hosts, before_extraction)
    return report if hosts.is_first else HostEnd(hosts.number, report.exit_code)


def _run(config: RunConfig, hosts: Hosts, before_extraction: BeforeExtraction | None) -> Summary | PlanReport:
    backend = backend_of(config)
    if backend.name == "jax":
        enable_compilation_cache(config.compilation_cache_dir)
    elif config.multihost:
        raise UsageError(_NOT_WITH_TORCH)
    if not config.plan:
        require_shared_output(config, hosts)
    compute_dtype = backend.compute_dtype(config.compute_dtype)
    if config.use_sharded_dataset:
        jobs = prepare_shard_jobs(config, compute_dtype, hosts)
        stores = open_stores(config, jobs[0].plan.parts)
        return _plan(jobs) if config.plan else run_shards(jobs, stores, before_extraction)
    job = prepare_job(config, compute_dtype, hosts)
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


def _join_hosts(config: RunConfig) -> Hosts:
    """With --multihost all hosts of the slice are one worker, and share every window."""
    if not config.multihost:
        return ALONE
    hosts = join_hosts(config.coordinator_address, config.num_hosts, config.host_id, config.host_timeout_s)
    logging.info("host %d of %d", hosts.number, hosts.count)
    return hosts


# What may differ from host to host.
_OWN_FLAGS = (
    *("host_id", "coordinator_address", "log_file", "verbose", "json"),
    *("checkpoint_dir", "compilation_cache_dir", "weights_cache_dir"),
)


def _require_same_flags(config: RunConfig, hosts: Hosts) -> None:
    """Raises UsageError on a host whose flags are not those of the first one: they would not make one output.

    The first host goes on when all agree: what comes next, JAX's look for devices, waits for all hosts.
    """
    own = json.loads(json.dumps(asdict(config)))
    first = hosts.share("flags", lambda: own)
    # Where files wait for their upload is a host's own affair too.
    may_differ = {*_OWN_FLAGS, "output_dir"} if config.uploads else set(_OWN_FLAGS)
    for flags in (own, first):
        for name in may_differ:
            flags.pop(name, None)
    differences = differing_fields(first, own)
    if differences:
        told = "; ".join(difference.replace(" there", " on host 0") for difference in differences)
        raise UsageError(f"--multihost: the flags of host {hosts.number} differ ({told}): start all hosts alike")
    hosts.tell(f"same_flags/{hosts.number}", True)
    for host in range(1, hosts.count) if hosts.is_first else ():
        hosts.wait_for(f"same_flags/{host}")


def _plan(jobs: Sequence[Job]) -> PlanReport:
    """Prices what the output does not hold yet."""
    stores = open_stores(jobs[0].config, jobs[0].plan.parts)
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
    stores = open_stores(job.config, job.plan.parts)
    storage = open_storage(job, stores)
    storage.spool.remove_stale_temporaries()
    prepared = prepare_stream(job, storage)
    if before_extraction is not None and prepared.windows is not None:
        before_extraction(job, stores)
    model = load(job, prepared.first_shape) if prepared.windows is not None else None
    with (
        stop_on_signals(job.config.stop_grace_s, is_told=job.hosts.asks_to_stop("run")) as stop,
        HostSession(job.hosts, "stream", StopOfAny(job.hosts, "run", stop)) as session,
    ):
        return run_stream(prepared, model, session)
