"""The price of a run, before it runs: `--plan`."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Shaped

from core.commit.record import CommitRecord
from core.object_store.sinks import deflate_block
from core.reduce.pooling import fetch_rows
from core.run.config import RunConfig
from core.run.extraction import is_complete, resume_place
from core.run.job import Job
from core.run.progress import HostExit, format_bytes, format_reasons
from core.run.runner import on_every_host, prepare_jobs
from core.run.stores import open_storage, open_stores
from core.run.stream_run import LoadedStep, load
from core.run.survey import TABLE_BYTES_PER_TOKEN, disk_needed, stored_bytes, typical_ratio
from core.samples.selection import count_reasons
from core.samples.windows import Window
from core.shards.formats import FORMATS
from core.step.backend import StepOutput
from core.step.gathering import gather
from core.step.host_copies import begin_copies, on_host
from core.step.layout import StepLayout, step_arrays

# `--plan` compresses up to this many bytes to measure the compression ratio of the run.
_MEASURED_BYTES = 16 << 20


@dataclass(frozen=True)
class PlanReport:
    """The output of `--plan`: the remaining work, and what earlier runs have committed.

    Attributes:
      padding_waste: share of computed tokens that belong to no sample.
      dropped_tokens: by reason, the tokens that are computed but not stored; without norm outliers, which are known
        only after the forward pass.
      reduction: how stored tokens are reduced; None: not at all.
      bytes_copied: from the devices to the host; bytes_copied_whole: the same without selection and reduction.
      bytes_saved: bytes on disk saved by selection and reduction.
    """

    committed_samples: int
    committed_shards: int
    samples: int = 0
    tokens: int = 0
    stored_tokens: int = 0
    dropped_tokens: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    bad_records: int = 0
    padding_waste: float = 0.0
    steps: int = 0
    shards: int = 0
    bytes_on_disk: int = 0
    bytes_saved: int = 0
    reduction: str | None = None
    bytes_copied: int = 0
    bytes_copied_whole: int = 0
    free_disk_bytes: int | None = None
    fits_on_disk: bool = True
    seconds_per_step: float = 0.0
    tokens_per_second: float = 0.0
    estimated_seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """1 when the run would not fit on the disk."""
        return 0 if self.fits_on_disk else 1

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The plan as lines of text."""
        done = [f"committed        {self.committed_samples} samples in {self.committed_shards} shards; what is left:"]
        lines = done if self.committed_shards else []
        if not self.samples:
            return [*lines, "nothing is left to do"]
        free = "unbounded" if self.free_disk_bytes is None else format_bytes(self.free_disk_bytes)
        lines += [
            f"samples          {self.samples} ({self.truncated} truncated, {self.bad_records} bad records)",
            f"tokens           {self.tokens}",
        ]
        if self.dropped_tokens:
            lines.append(
                f"stored tokens    {self.stored_tokens} (left out: {format_reasons(self.dropped_tokens)})"
                + ("" if self.reduction else f", which saves {format_bytes(self.bytes_saved)}")
            )
        if self.reduction:
            lines += [
                f"reduction        {self.reduction}, which saves {format_bytes(self.bytes_saved)} on disk",
                f"device to host   {format_bytes(self.bytes_copied)}, not {format_bytes(self.bytes_copied_whole)}",
            ]
        return [
            *lines,
            f"padding waste    {self.padding_waste:.1%} of {self.steps} steps",
            f"shards           {self.shards}",
            f"bytes on disk    {format_bytes(self.bytes_on_disk)} ({free} free"
            + ("" if self.fits_on_disk else "; it does not fit")
            + ")",
            f"estimated time   {format_duration(self.estimated_seconds)} at {self.tokens_per_second:.0f} tokens/s "
            f"(one step of {self.seconds_per_step:.2f} s timed)",
        ]


def format_duration(seconds: float) -> str:
    """`1 h 05 min`, `3 min 20 s` or `12.5 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def price_run(config: RunConfig) -> PlanReport | HostExit:
    """The price of a run with these flags; nothing is written. Raises RunError, UsageError or ModelError."""
    return on_every_host(config, lambda hosts: _price(prepare_jobs(config, hosts)))


def _price(jobs: Sequence[Job]) -> PlanReport:
    """The price of the windows that are not committed yet."""
    stores = open_stores(jobs[0].config, jobs[0].identity.parts)
    done = [(job, open_storage(job, stores).open()) for job in jobs]
    left = ((job, resume_place(records)) for job, records in done if not is_complete(records))
    windows = (job.windows(start=place, first_index=i, bad_before=bad) for job, (place, i, bad) in left)
    return plan_run(
        jobs[0],
        itertools.chain.from_iterable(windows),
        lambda: load(jobs[0]),
        committed=[record for _, records in done for record in records],
        free=stores.spool.free_bytes(),
    )


def plan_run(
    job: Job,
    windows: Iterator[Window],
    load_model: Callable[[], LoadedStep],
    *,
    committed: Sequence[CommitRecord],
    free: int | None,
) -> PlanReport:
    """Lays `windows` (of one stream, or of all dataset shards) out exactly as the run would, and times one step.

    Args:
      windows: those that are left, after the `committed` ones.
      load_model: called if anything is left.
    """
    samples_done = sum(record.n_samples for record in committed)
    first = next(windows, None)
    if first is None:
        return PlanReport(samples_done, len(committed), free_disk_bytes=free)
    part = next(job.parts_of(first))
    timed = job.layouts_of(part)[0]
    seconds, ratio = time_step(job, load_model(), part.own, timed)
    totals = _Totals(job.hosts.count)
    for window in itertools.chain([first], windows):
        totals.add(window, [layout for part in job.parts_of(window) for layout in job.layouts_of(part)])
    rate = job.hosts.count * timed.n_rows * timed.length / seconds
    needed = disk_needed(job, totals.tokens, totals.rows, ratio)
    on_disk = stored_bytes(job, totals.tokens, totals.rows, ratio)
    whole = totals.tokens * sum(job.bytes_per_token.values())
    return PlanReport(
        committed_samples=samples_done,
        committed_shards=len(committed),
        samples=totals.samples,
        tokens=totals.tokens,
        stored_tokens=totals.stored,
        dropped_tokens=dict(totals.dropped),
        truncated=totals.truncated,
        bad_records=totals.bad_records,
        padding_waste=round(1 - totals.tokens / totals.computed, 4),
        steps=totals.steps,
        shards=totals.windows,
        bytes_on_disk=on_disk,
        bytes_saved=int(whole * _unreduced_ratio(job, ratio)) + totals.tokens * TABLE_BYTES_PER_TOKEN - on_disk,
        reduction=None if job.reduction is None else str(job.reduction),
        bytes_copied=totals.rows * sum(job.bytes_per_row.values()),
        bytes_copied_whole=whole,
        free_disk_bytes=free,
        fits_on_disk=free is None or needed <= free,
        seconds_per_step=round(seconds, 4),
        tokens_per_second=round(totals.tokens / (totals.computed / rate), 1),
        estimated_seconds=round(totals.computed / rate, 2),
    )


def _unreduced_ratio(job: Job, ratio: float | None) -> float:
    """Stored over raw bytes without the reduction; `ratio` was measured with it."""
    return typical_ratio(job.config, job.config.dtype) if job.reduction is not None or ratio is None else ratio


@dataclass
class _Totals:
    """n_hosts: hosts that run every step together, each with its own rows."""

    n_hosts: int
    windows: int = 0
    samples: int = 0
    tokens: int = 0
    stored: int = 0
    rows: int = 0
    truncated: int = 0
    bad_records: int = 0
    steps: int = 0
    computed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, window: Window, layouts: Sequence[StepLayout]) -> None:
        self.windows += 1
        self.samples += len(window.samples)
        self.tokens += window.n_tokens
        self.stored += window.n_stored
        self.rows += window.n_rows
        self.dropped.update(count_reasons(s.reasons for s in window.samples if s.reasons is not None))
        self.truncated += sum(sample.full_length > len(sample.token_ids) for sample in window.samples)
        self.bad_records += len(window.bad_records)
        self.steps += len(layouts)
        self.computed += self.n_hosts * sum(layout.n_rows * layout.length for layout in layouts)


def time_step(job: Job, model: LoadedStep, window: Window, layout: StepLayout) -> tuple[float, float | None]:
    """Seconds of one step after compilation, and stored over raw bytes of its first row (None: nothing to measure)."""
    arrays = step_arrays(layout, [sample.token_ids for sample in window.samples])
    fetch = fetch_rows(layout, window.samples, window.lengths, job.pools)

    def fetched() -> StepOutput:
        output = gather(model.step(arrays), fetch.gathered)
        return on_host(begin_copies(output if model.reduce is None else model.reduce(output, fetch)))

    fetched()
    started = time.monotonic()
    activations = fetched().arrays
    seconds = time.monotonic() - started
    values = next(iter(activations.values()))
    stored = [values[:, row, places].reshape(-1) for row, places in fetch.samples.values() if row == 0]
    sample = np.concatenate(stored)[: _MEASURED_BYTES // values.itemsize] if stored else values[:0]
    return seconds, _measured_ratio(job, sample) if sample.size else None


def _measured_ratio(job: Job, values: Shaped[np.ndarray, "n"]) -> float:
    """Stored over raw bytes."""
    ratio = FORMATS[job.config.format].stored_bytes(values) / values.nbytes
    return ratio * len(deflate_block([values.view(np.uint8).data])) / values.nbytes if job.config.gzipped else ratio
