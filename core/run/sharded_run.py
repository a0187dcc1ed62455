"""One worker's run over a sharded dataset: it claims shard after shard until none is left."""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from absl import logging

from core.base.errors import RunError, is_fault_of_the_machine
from core.base.redaction import redact
from core.claims.leases import Lease, ShardClaims
from core.claims.records import Owner
from core.commit.output_identity import DATASET_FILE, RUN_FILE, declare, refuse_other
from core.commit.stored_records import committed_records, has_index_of
from core.hosts.session import HostSession, StopOfAny
from core.object_store import ObjectStore
from core.run.job import Job
from core.run.progress import Progress, Summary
from core.run.signals import stop_on_signals
from core.run.stores import Stores, open_storage
from core.run.stream_run import LoadedStep, load, prepare_stream, run_stream
from core.streams.sharded_dataset import MASTER_FILE, SHARD_FILE, find_shard, read_dataset

# Called with the first job and the stores, before anything is written.
BeforeExtraction = Callable[[Job, Stores], None]
# Shards that fail one after another point at this machine rather than at each of them.
_FAILURES_IN_A_ROW = 3
# Whichever host finds an error first.
_HOST = re.compile(r"^host [0-9]+: ")
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b")
_SUMMED = ("samples", "tokens", "bytes", "shards", "truncated", "bad_records", "empty_samples")


@dataclass(frozen=True)
class ShardedSummary(Summary):
    """What one worker did for a dataset: its counts are sums over the dataset shards that it worked on.

    Attributes:
      status: "complete" when the whole dataset is, by whomever; "incomplete" when shards were set aside.
      finished_shards: the dataset shards that this worker brought to their end.
      set_aside: the dataset shards that fail again and again, with their error.
    """

    finished_shards: tuple[str, ...] = ()
    set_aside: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0, 1 when shards were set aside, or what a process that SIGTERM ended early returns."""
        return 1 if self.status == "incomplete" else super().exit_code

    def lines(self) -> list[str]:
        """The summary for people."""
        return [
            *super().lines(),
            f"dataset shards finished here: {', '.join(self.finished_shards) or 'none'}",
            *(f"SET ASIDE {shard}: {error}" for shard, error in sorted(self.set_aside.items())),
        ]


def is_shard_finished(store: ObjectStore, folder: str) -> bool:
    """Whether the records in a folder reach its stream's end without a gap, all files they name are there, and the
    index lists them: a worker that died right behind the last record has left the index to the next one.
    """
    records = committed_records(store, folder)
    return bool(records) and records[-1].next_place is None and has_index_of(store, folder, records)


def run_shards(
    jobs: Sequence[Job], stores: Stores, before_extraction: BeforeExtraction | None = None
) -> ShardedSummary:
    """Works through the dataset beside any number of other workers, until all of it is done or a signal comes.

    An error of a shard's data is noted beside its claims, and the worker goes on with the others. Raises UsageError
    when the output holds another run or dataset, and RunError when this machine or its storage fails.
    """
    identities = _identities(jobs)
    _refuse_other_run(identities, stores)
    run = _ShardedRun(jobs, stores)
    anything_left = run.anything_left()
    if before_extraction is not None and anything_left:
        before_extraction(jobs[0], stores)
    _declare(identities, stores)
    if stores.primary is stores.spool:
        logging.info(
            "workers share the dataset through %s/claims: it must be the same disk for all", stores.primary.url
        )
    stores.spool.remove_stale_temporaries()
    # Loading comes before the first claim: a process that is killed meanwhile holds up nobody.
    model = load(jobs[0]) if anything_left else None
    if jobs[0].hosts.count > 1:
        jobs[0].hosts.abandon = run.abandon
    is_told = jobs[0].hosts.asks_to_stop("run")
    with stop_on_signals(jobs[0].config.stop_grace_s, abandon=run.abandon, is_told=is_told) as told_here:
        if model is not None:
            run.work(model, StopOfAny(jobs[0].hosts, "run", told_here))
        return run.summary(model)


def _identities(jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """What the output is for, by the name of the file that says so."""
    return {
        RUN_FILE: jobs[0].identity.to_json(),
        DATASET_FILE: {
            "shards": {job.folder: job.stream.to_json() for job in jobs},
            "num_tasks": _tasks_by_shard(jobs),
        },
    }


def _refuse_other_run(identities: Mapping[str, dict[str, Any]], stores: Stores) -> None:
    for store in stores.all():
        for name, content in identities.items():
            refuse_other(store, name, content)


def _declare(identities: Mapping[str, dict[str, Any]], stores: Stores) -> None:
    """Writes what the output is for, create-only; raises UsageError if another run did so meanwhile."""
    for store in stores.all():
        for name, content in identities.items():
            declare(store, name, content)


def _tasks_by_shard(jobs: Sequence[Job]) -> dict[str, int]:
    """How many lines of each shard are to be done: what `status` measures progress by."""
    assert jobs[0].config.sharded_dataset_dir is not None
    sizes = {shard.name: shard.num_tasks for shard in read_dataset(jobs[0].config.sharded_dataset_dir).shards}
    return {job.folder: min(sizes[job.folder], job.stream.max_tasks or sizes[job.folder]) for job in jobs}


class _AnyEvent(threading.Event):
    """Set when itself or one of the others is."""

    def __init__(self, *others: threading.Event) -> None:
        super().__init__()
        self._others = others

    def is_set(self) -> bool:
        return super().is_set() or any(other.is_set() for other in self._others)


class _ShardedRun:
    """The shards that this worker claims, and what became of them."""

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

    def anything_left(self) -> bool:
        """Whether the claims leave a shard to be done; asked by all hosts at once."""
        return self._hosts.share("anything left", lambda: self._claims.is_anything_left(list(self._jobs)))

    def _standing(self) -> tuple[bool, dict[str, str]]:
        """Whether a shard is left, and those set aside, with their errors: all of them when none is left."""

        def found() -> tuple[bool, dict[str, str]]:
            return self._claims.is_anything_left(list(self._jobs)), dict(self._claims.set_aside)

        left, set_aside = self._hosts.share(f"standing/{self._n_sessions}", found)
        return left, set_aside

    def work(self, model: LoadedStep, stop: threading.Event) -> None:
        """Claims and extracts until nothing is left or `stop` is set. On a slice the first host claims for all."""
        self._started = time.monotonic()
        if not self._hosts.is_first:
            self._follow(model, stop)
            return
        while (lease := self._claims.next(list(self._jobs), self._preferred, stop)) is not None:
            self._lease = lease
            with lease:
                self._work_on(lease, model, stop)
        self._hosts.tell(self._next_session(), None)

    def _next_session(self) -> str:
        self._n_sessions += 1
        return f"session/{self._n_sessions}"

    def _follow(self, model: LoadedStep, stop: threading.Event) -> None:
        """Extracts what the first host claims."""

        def wait_on() -> bool:
            # Asking it is what tells the other hosts that this one is to stop; then the first one announces the end.
            stop.is_set()
            return True

        while (shard := self._hosts.wait_for(self._next_session(), wait_on)) is not None:
            try:
                with self._session(stop) as session:
                    self._summaries.append((shard, self._extract(shard, model, session)))
            except Exception as error:
                if is_fault_of_the_machine(error):
                    raise
                logging.warning("%s: given up: %s", shard, error)

    def _session(self, stop: threading.Event) -> HostSession:
        return HostSession(self._hosts, str(self._n_sessions), stop)

    def abandon(self) -> None:
        """Gives back what is being worked on, from another thread, when the process is about to end."""
        if self._lease is not None:
            self._lease.abandon()

    def _work_on(self, lease: Lease, model: LoadedStep, stop: threading.Event) -> None:
        self._hosts.tell(self._next_session(), lease.shard)
        try:
            with self._session(_AnyEvent(stop, lease.lost)) as session:
                summary = self._extract(lease.shard, model, session, lease)
        except Exception as error:
            if is_fault_of_the_machine(error):
                raise
            if stop.is_set() or lease.lost.is_set():
                # What goes wrong while everything is being given up says nothing about the data.
                logging.warning("%s: given up: %s", lease.shard, error)
                return
            self._note_failure(lease, error)
            return
        self._failed_in_a_row.clear()
        self._summaries.append((lease.shard, summary))
        if summary.status == "complete" and lease.is_held():
            self._finished.append(lease.shard)
            lease.release("done")

    def _extract(self, shard: str, model: LoadedStep, session: HostSession, lease: Lease | None = None) -> Summary:
        """lease: of the host that has claimed the shard."""
        job = self._jobs[shard]
        if lease is not None:
            logging.info("%s: claimed (lease %d)", shard, lease.epoch)
        _check_shard(job)

        def report_on(progress: Progress) -> None:
            if lease is not None:
                lease.report = lambda: {
                    "samples": progress.samples,
                    "tokens": progress.tokens,
                    "computed_samples": progress.samples_computed,
                }

        return run_stream(
            prepare_stream(job, open_storage(job, self._stores), session.agree),
            model,
            session,
            log=lambda line: logging.info("%s: %s", shard, line),
            on_start=report_on,
            may_write_index=lambda: lease is not None and lease.is_held(),
        )

    def _note_failure(self, lease: Lease, error: Exception) -> None:
        text = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        logging.error("%s failed: %s", lease.shard, text, exc_info=None if isinstance(error, RunError) else error)
        text = self._the_same_for_all(text)
        self._claims.record_failure(lease, text)
        lease.release("failed")
        self._failed_in_a_row.add(lease.shard)
        if len(self._failed_in_a_row) >= _FAILURES_IN_A_ROW:
            shards = ", ".join(sorted(self._failed_in_a_row))
            raise RunError(f"{shards} failed one after another; the last one: {text}") from error

    def _the_same_for_all(self, text: str) -> str:
        """An error without what differs from worker to worker: where the dataset lies, and addresses of objects."""
        config = next(iter(self._jobs.values())).config
        root = (config.sharded_dataset_dir or "").rstrip("/") + "/"
        text = _HOST.sub("", text)
        return redact(" ".join(_ADDRESS.sub("0x…", text.replace(root, "")).split()))

    def summary(self, model: LoadedStep | None) -> ShardedSummary:
        """What this worker did, and how the whole dataset stands."""
        seconds = time.monotonic() - self._started
        left, set_aside = self._standing()
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
            status="stopped" if left else "incomplete" if set_aside else "complete",
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
    """Raises RunError if a shard's own metadata is not what the dataset's manifest says of it."""
    shard = find_shard(job.stream_path)
    if shard is None:
        raise RunError(f"{job.stream_path}: no such shard, but the dataset's manifest names it: copy the dataset again")
    if (shard.identity, shard.first_task) != (job.stream.identity, job.stream.first_position):
        raise RunError(f"{job.stream_path}/{SHARD_FILE} and {MASTER_FILE} disagree: copy the dataset again")
