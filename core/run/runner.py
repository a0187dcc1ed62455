"""One run from flags to summary: set up, check, extract, report."""

import ctypes
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Protocol, TypeVar

from absl import logging

from core.base.errors import UsageError
from core.base.signals import stop_on_signals
from core.commit.identity import differing_fields
from core.hosts.pod_slice import SINGLE_HOST, Hosts, join_hosts
from core.hosts.session import HostSession, SharedStopEvent
from core.jax_utils import enable_compilation_cache
from core.run.checks import backend_of, prepare_job, prepare_shard_jobs
from core.run.config import RunConfig
from core.run.job import Job
from core.run.progress import HostExit, Summary
from core.run.sharded_run import BeforeExtraction, run_shards
from core.run.stores import open_storage, open_stores, require_shared_output
from core.run.stream_run import load, prepare_stream, run_stream

_NOT_WITH_TORCH = "--multihost: JAX joins hosts, torch does not: use --machine_id and --total_machines"


class HasExitCode(Protocol):
    """The result of a run."""

    @property
    def exit_code(self) -> int: ...


Report = TypeVar("Report", bound=HasExitCode)
# malloc.h
_M_ARENA_MAX = -8
_M_MMAP_THRESHOLD = -3


def run(config: RunConfig, before_extraction: BeforeExtraction | None = None) -> Summary | HostExit:
    """Runs one worker's extraction. Raises RunError, UsageError or ModelError.

    Of the hosts of a slice, host 0 returns the summary.

    before_extraction: called once with the (first) job and its stores when there is something left to extract, before
    anything is written or loaded. An exception that it raises ends the run.
    """

    def work(hosts: Hosts) -> Summary:
        require_shared_output(config, hosts)
        jobs = prepare_jobs(config, hosts)
        if config.use_sharded_dataset:
            return run_shards(jobs, open_stores(config, jobs[0].identity.parts), before_extraction)
        return _extract(jobs[0], before_extraction)

    return on_every_host(config, work)


def on_every_host(config: RunConfig, work: Callable[[Hosts], Report]) -> Report | HostExit:
    """Sets this process up, joins the hosts of the slice if there is one, and runs `work`; host 0 gets the result."""
    _limit_malloc_arenas()
    if config.gcs_bucket is not None and not config.uploads:
        logging.warning("--gcs_bucket %s is not used without --upload_to_gcs", config.gcs_bucket)
    if config.multihost and config.backend == "torch":
        raise UsageError(_NOT_WITH_TORCH)
    # An error in the block ends all hosts.
    with _join_hosts(config) as hosts:
        _require_same_flags(config, hosts)
        report = work(hosts)
    return report if hosts.is_first else HostExit(hosts.host_id, report.exit_code)


def prepare_jobs(config: RunConfig, hosts: Hosts) -> list[Job]:
    """The checked jobs of a run: one for --dataset_path, one for each shard of a sharded dataset."""
    backend = backend_of(config)
    if backend.name == "jax":
        enable_compilation_cache(config.compilation_cache_dir)
    elif config.multihost:
        raise UsageError(_NOT_WITH_TORCH)
    compute_dtype = backend.compute_dtype(config.compute_dtype)
    if config.use_sharded_dataset:
        return prepare_shard_jobs(config, compute_dtype, hosts)
    return [prepare_job(config, compute_dtype, hosts)]


def _limit_malloc_arenas() -> None:
    """Makes glibc return large arrays to the system, and use two arenas for all threads.

    By default every thread has an arena of its own in which freed arrays stay and fragment, so the memory of a long
    run grows. Other C libraries are left alone.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_ARENA_MAX, 2)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _join_hosts(config: RunConfig) -> Hosts:
    """With --multihost, all hosts of the slice are one worker and share every window."""
    if not config.multihost:
        return SINGLE_HOST
    hosts = join_hosts(config.coordinator_address, config.num_hosts, config.host_id, config.host_timeout_s)
    logging.info("host %d of %d", hosts.host_id, hosts.count)
    return hosts


# What may differ from host to host.
_PER_HOST_FLAGS = (
    *("host_id", "coordinator_address", "log_file", "verbose", "json"),
    *("checkpoint_dir", "compilation_cache_dir", "weights_cache_dir"),
)


def _require_same_flags(config: RunConfig, hosts: Hosts) -> None:
    """Raises UsageError on a host whose flags differ from host 0's: together they would not make one output.

    Host 0 waits until all have compared: the next step, in which JAX discovers devices, blocks until all hosts join.
    """
    own = json.loads(json.dumps(asdict(config)))
    first = hosts.broadcast("flags", lambda: own)
    # The folder in which files wait for their upload may differ, too.
    may_differ = {*_PER_HOST_FLAGS, "output_dir"} if config.uploads else set(_PER_HOST_FLAGS)
    for flags in (own, first):
        for name in may_differ:
            flags.pop(name, None)
    differences = differing_fields(first, own)
    if differences:
        shown = "; ".join(difference.replace(" there", " on host 0") for difference in differences)
        raise UsageError(
            f"--multihost: the flags of host {hosts.host_id} differ ({shown}): start all hosts with the same flags"
        )
    hosts.publish(f"same_flags/{hosts.host_id}", True)
    for host in range(1, hosts.count) if hosts.is_first else ():
        hosts.wait_for(f"same_flags/{host}")


def _extract(job: Job, before_extraction: BeforeExtraction | None) -> Summary:
    stores = open_stores(job.config, job.identity.parts)
    storage = open_storage(job, stores)
    storage.spool.remove_stale_temporaries()
    prepared = prepare_stream(job, storage)
    if before_extraction is not None and prepared.windows is not None:
        before_extraction(job, stores)
    model = load(job, prepared.first_shape) if prepared.windows is not None else None
    with (
        stop_on_signals(job.config.stop_grace_s, peer_stopping=job.hosts.stop_poller("run")) as stop,
        HostSession(job.hosts, "stream", SharedStopEvent(job.hosts, "run", stop)) as session,
    ):
        return run_stream(prepared, model, session)
