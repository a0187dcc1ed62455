"""One worker's run over a sharded dataset: it claims shard after shard until none is left."""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from absl import logging

from core.base.errors import RunError, is_machine_fault
from core.base.redaction import redact
from core.base.signals import stop_on_signals
from core.claims.leases import Lease, ShardClaims
from core.claims.records import Owner
from core.commit.output_identity import DATASET_FILE, RUN_FILE, check_identity, write_identity
from core.commit.stored_records import committed_records, has_current_metadata
from core.hosts.session import HostSession, SharedStopEvent
from core.object_store import ObjectStore
from core.run.job import Job
from core.run.progress import Progress, Summary
from core.run.stores import Stores, open_storage
from core.run.stream_run import LoadedStep, load, prepare_stream, run_stream
from core.streams.sharded_dataset import MASTER_FILE, SHARD_FILE, find_shard, read_dataset

# Called with the first job and the stores, before anything is written.
BeforeExtraction = Callable[[Job, Stores], None]
# Consecutive failures of different shards suggest a fault of this machine.
_FAILURES_IN_A_ROW = 3
# The host that finds an error first differs from run to run.
_HOST = re.compile(r"^host [0-9]+: ")
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b")
_SUMMED = ("samples", "tokens", "bytes", "shards", "truncated", "bad_records", "empty_samples")


@dataclass(frozen=True)
class ShardedSummary(Summary):
    """The result of one worker's run over a dataset: its counts are sums over the dataset shards it worked on.

    Attributes:
      status: "complete" when the whole dataset is, by any workers; "incomplete" when shards were set aside.
      finished_shards: the dataset shards that this worker completed.
      set_aside: the dataset shards that failed repeatedly, with their error.
    """

    finished_shards: tuple[str, ...] = ()
    set_aside: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0; 1 when shards were set aside; that of a process ended by SIGTERM when the run was stopped early."""
        return 1 if self.status == "incomplete" else super().exit_code

    def lines(self) -> list[str]:
        """The summary as lines of text."""
        return [
            *super().lines(),
            f"dataset shards finished here: {', '.join(self.finished_shards) or 'none'}",
            *(f"SET ASIDE {shard}: {error}" for shard, error in sorted(self.set_aside.items())),
        ]


def is_shard_finished(store: ObjectStore, folder: str) -> bool:
    """Whether a folder's records reach the end of its stream without a gap, all their files exist, and metadata.json
    lists them: a worker that died right after the last record leaves metadata.json to the next one.
    """
    records = committed_records(store, folder)
    return bool(records) and records[-1].next_place is None and has_current_metadata(store, folder, records)


def run_shards(
    jobs: Sequence[Job], stores: Stores, before_extraction: BeforeExtraction | None = None
) -> ShardedSummary:
    """Claims and extracts dataset shards, alongside other workers, until all are done or a signal arrives.

    An error of a shard's data is recorded with its claims, and the worker continues with other shards. Raises
    UsageError when the output belongs to another run or dataset, and RunError when this machine or its storage fails.
    """
    identities = _identities(jobs)
    _check_identities(identities, stores)
    run = _ShardedRun(jobs, stores)
    any_remaining = run.any_remaining()
    if before_extraction is not None and any_remaining:
        before_extraction(jobs[0], stores)
    _write_identities(identities, stores)
    if stores.primary is stores.spool:
        logging.info(
            "workers share the dataset through %s/claims: it must be the same disk for all", stores.primary.url
        )
    stores.spool.remove_stale_temporaries()
    # Loading comes before the first claim: a process that is killed meanwhile blocks no other worker.
    model = load(jobs[0]) if any_remaining else None
    if jobs[0].hosts.count > 1:
        jobs[0].hosts.abandon = run.abandon
    peer_stopping = jobs[0].hosts.stop_poller("run")
    with stop_on_signals(jobs[0].config.stop_grace_s, abandon=run.abandon, peer_stopping=peer_stopping) as local_stop:
        if model is not None:
            run.work(model, SharedStopEvent(jobs[0].hosts, "run", local_stop))
        return run.summary(model)


def _identities(jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """The contents of the identity files, by file name."""
    return {
        RUN_FILE: jobs[0].identity.to_json(),
        DATASET_FILE: {
            "shards": {job.folder: job.stream.to_json() for job in jobs},
            "num_tasks": _tasks_by_shard(jobs),
        },
    }


def _check_identities(identities: Mapping[str, dict[str, Any]], stores: Stores) -> None:
    for store in stores.all():
        for name, content in identities.items():
            check_identity(store, name, content)


def _write_identities(identities: Mapping[str, dict[str, Any]], stores: Stores) -> None:
    """Writes the identity files, create-only; raises UsageError if another run did so meanwhile."""
    for store in stores.all():
        for name, content in identities.items():
            write_identity(store, name, content)


def _tasks_by_shard(jobs: Sequence[Job]) -> dict[str, int]:
    """The number of lines to extract of each shard, relative to which `status` measures progress."""
    assert jobs[0].config.sharded_dataset_dir is not None
    sizes = {shard.name: shard.num_tasks for shard in read_dataset(jobs[0].config.sharded_dataset_dir).shards}
    return {job.folder: min(sizes[job.folder], job.stream.max_tasks or sizes[job.folder]) for job in jobs}


class _AnyEvent(threading.Event):
    """Set when it is set itself, or one of `others` is."""

    def __init__(self, *others: threading.Event) -> None:
        super().__init__()
        self._others = others

    def is_set(self) -> bool:
        return super().is_set() or any(other.is_set() for other in self._others)


class _ShardedRun:
    """The dataset shards that this worker claims, and their results."""

    def __init__(self, jobs: Sequence[Job], stores: Stores) -> None:
        config = jobs[0].config
        self._jobs = {job.folder: job for job in jobs}
        self._stores = stores
        self._preferred = None if config.preferred_shard_id is None else f"shard_{config.preferred_shard_id:03d}"
        self._claims = ShardClaims(
            stores.primary,
            Owner.of_this_process(config.worker_id),
            ttl_s=config.claim_ttl_s,
            heartbeat_s=config.claim_heartbeat_s,
            stall_s=config.claim_stall_s,
            is_finished=lambda shard: is_shard_finished(stores.primary, shard),
        )
        self._started = time.monotonic()
        self._summaries: list[tuple[str, Summary]] = []
        self._finished: list[str] = []
        self._failed_in_a_row: set[str] = set()
        self._lease: Lease | None = None
        self._hosts = jobs[0].hosts
        self._n_sessions = 0

    def any_remaining(self) -> bool:
        """Whether a shard remains to be extracted; called by all hosts together."""
        return self._hosts.broadcast("any remaining", lambda: self._claims.any_remaining(list(self._jobs)))

    def _dataset_state(self) -> tuple[bool, dict[str, str]]:
        """Whether a shard remains, and the shards set aside with their errors (all of them when none remains)."""

        def read() -> tuple[bool, dict[str, str]]:
            return self._claims.any_remaining(list(self._jobs)), dict(self._claims.set_aside)

        remaining, set_aside = self._hosts.broadcast(f"dataset/{self._n_sessions}", read)
        return remaining, set_aside

    def work(self, model: LoadedStep, stop: threading.Event) -> None:
        """Claims and extracts until no shard remains or `stop` is set. In a slice, host 0 claims for all hosts."""
        self._started = time.monotonic()
        if not self._hosts.is_first:
            self._follow(model, stop)
            return
        while (lease := self._claims.next(list(self._jobs), self._preferred, stop)) is not None:
            self._lease = lease
            with lease:
                self._work_on(lease, model, stop)
        self._hosts.publish(self._next_session(), None)

    def _next_session(self) -> str:
        self._n_sessions += 1
        return f"session/{self._n_sessions}"

    def _follow(self, model: LoadedStep, stop: threading.Event) -> None:
        """Extracts the shards that host 0 claims."""

        def keep_waiting() -> bool:
            # `is_set` publishes this host's stop request to the other hosts; host 0 then announces the end.
            stop.is_set()
            return True

        while (shard := self._hosts.wait_for(self._next_session(), keep_waiting)) is not None:
            try:
                with self._session(stop) as session:
                    self._summaries.append((shard, self._extract(shard, model, session)))
            except Exception as error:
                if is_machine_fault(error):
                    raise
                logging.warning("%s: dropped: %s", shard, error)

    def _session(self, stop: threading.Event) -> HostSession:
        return HostSession(self._hosts, str(self._n_sessions), stop)

    def abandon(self) -> None:
        """Releases the claimed shard, from another thread, when the process is about to exit."""
        if self._lease is not None:
            self._lease.abandon()

    def _work_on(self, lease: Lease, model: LoadedStep, stop: threading.Event) -> None:
        self._hosts.publish(self._next_session(), lease.shard)
        try:
            with self._session(_AnyEvent(stop, lease.lost)) as session:
                summary = self._extract(lease.shard, model, session, lease)
        except Exception as error:
            if is_machine_fault(error):
                raise
            if stop.is_set() or lease.lost.is_set():
                # An error during shutdown need not come from the data.
                logging.warning("%s: dropped: %s", lease.shard, error)
                return
            self._record_failure(lease, error)
            return
        self._failed_in_a_row.clear()
        self._summaries.append((lease.shard, summary))
        if summary.status == "complete" and lease.is_held():
            self._finished.append(lease.shard)
            lease.release("done")

    def _extract(self, shard: str, model: LoadedStep, session: HostSession, lease: Lease | None = None) -> Summary:
        """lease: None on hosts other than the one that has claimed the shard."""
        job = self._jobs[shard]
        if lease is not None:
            logging.info("%s: claimed (lease %d)", shard, lease.epoch)
        _check_shard(job)

        def report_progress(progress: Progress) -> None:
            if lease is not None:
                lease.report = lambda: {
                    "samples": progress.samples,
                    "tokens": progress.tokens,
                    "computed_samples": progress.samples_computed,
                }

        return run_stream(
            prepare_stream(job, open_storage(job, self._stores), session.broadcast),
            model,
            session,
            log=lambda line: logging.info("%s: %s", shard, line),
            on_start=report_progress,
            may_write_metadata=lambda: lease is not None and lease.is_held(),
        )

    def _record_failure(self, lease: Lease, error: Exception) -> None:
        text = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        logging.error("%s failed: %s", lease.shard, text, exc_info=None if isinstance(error, RunError) else error)
        text = self._without_worker_details(text)
        self._claims.record_failure(lease, text)
        lease.release("failed")
        self._failed_in_a_row.add(lease.shard)
        if len(self._failed_in_a_row) >= _FAILURES_IN_A_ROW:
            shards = ", ".join(sorted(self._failed_in_a_row))
            raise RunError(f"{shards} failed one after another; the last one: {text}") from error

    def _without_worker_details(self, text: str) -> str:
        """An error without what differs between workers: the dataset's location, host ids and object addresses."""
        config = next(iter(self._jobs.values())).config
        root = (config.sharded_dataset_dir or "").rstrip("/") + "/"
        text = _HOST.sub("", text)
        return redact(" ".join(_ADDRESS.sub("0x…", text.replace(root, "")).split()))

    def summary(self, model: LoadedStep | None) -> ShardedSummary:
        """The result of this worker, with the state of the whole dataset."""
        seconds = time.monotonic() - self._started
        remaining, set_aside = self._dataset_state()
        done = [summary for _, summary in self._summaries]
        last = dict(self._summaries).values()
        stages = Counter[str]()
        for summary in done:
            stages.update(summary.stages)
        sums = {name: sum(getattr(summary, name) for summary in done) for name in _SUMMED}
        totals = {name: sum(getattr(summary, name) for summary in last) for name in ("total_samples", "total_shards")}
        return ShardedSummary(
            **sums,
            **totals,
            dropped_tokens=dict(sum((Counter(summary.dropped_tokens) for summary in done), Counter[str]())),
            status="stopped" if remaining else "incomplete" if set_aside else "complete",
            output=self._stores.primary.url,
            tokens_per_second=round(sums["tokens"] / max(seconds, 1e-9), 1),
            seconds=round(seconds, 3),
            load_seconds=round(model.seconds, 3) if model is not None else 0.0,
            stages={name: round(busy, 3) for name, busy in stages.items()},
            bottleneck=max(stages, key=lambda name: stages[name]) if stages else None,
            finished_shards=tuple(self._finished),
            set_aside=set_aside,
        )


def _check_shard(job: Job) -> None:
    """Raises RunError if a dataset shard's own metadata differs from the dataset's manifest."""
    shard = find_shard(job.stream_path)
    if shard is None:
        raise RunError(f"{job.stream_path}: no such shard, but the dataset's manifest lists it: copy the dataset again")
    if (shard.identity, shard.first_task) != (job.stream.identity, job.stream.first_position):
        raise RunError(f"{job.stream_path}/{SHARD_FILE} and {MASTER_FILE} disagree: copy the dataset again")
