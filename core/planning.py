"""What a run will cost, before it is paid for: a quick survey for every start, and the exact plan for `--plan`."""

import errno
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from core.batching import BatchShape, Step, plan_steps, step_arrays
from core.dataset_utils import read_stream, selected_positions
from core.errors import RunError
from core.extraction import WINDOWS_IN_MEMORY
from core.jax_utils import ExtractionStep
from core.job import Job
from core.progress import format_bytes
from core.sinks import BLOCK_BYTES, deflate_block
from core.windows import TokenizedSample, Window

_SURVEYED_RECORDS = 32
# Stored over raw bytes of gzipped activations, measured on real models: what a survey assumes before any is computed.
_GZIP_RATIO = {"float16": 0.93, "bfloat16": 0.79, "float32": 0.93}
# A token in the sample table: its id and its share of preview and labels, compressed.
_TABLE_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Survey:
    """An estimate of a stream from a few records spread evenly over it."""

    samples: int
    tokens: int


def survey_stream(job: Job) -> Survey:
    """Counts the records and tokenises a few of them; a small stream is counted whole."""
    config = job.config
    positions = selected_positions(job.stream_path, config.machine_id, config.total_machines, job.stream.max_tasks)
    n_records = len(positions)
    stride = max(1, n_records // _SURVEYED_RECORDS)
    surveyed = read_stream(
        job.stream_path,
        machine_id=positions.start % (positions.step * stride),
        total_machines=positions.step * stride,
        max_tasks=math.ceil(n_records / stride) or None,
    )
    records = list(surveyed)
    lengths = [len(item.token_ids) for item in job.tokenizer.samples(records) if isinstance(item, TokenizedSample)]
    scale = n_records / max(len(records), 1)
    return Survey(round(len(lengths) * scale), round(sum(lengths) * scale))


def stored_bytes(job: Job, tokens: int, ratio: float | None = None) -> int:
    """Bytes on disk of `tokens` tokens; `ratio` is stored over raw bytes where it was measured."""
    config = job.config
    if ratio is None:
        ratio = _GZIP_RATIO[config.dtype] if config.gzipped else 1.0
    per_token = job.bytes_per_token * len(job.capture.sites) * ratio + _TABLE_BYTES_PER_TOKEN
    return int(tokens * per_token)


def disk_needed(job: Job, tokens: int, ratio: float | None = None) -> int:
    """Local bytes a run needs: everything, or the few windows under way when the local files do not stay."""
    needed = stored_bytes(job, tokens, ratio)
    if job.config.local_copy_stays:
        return needed
    return min(needed, 2 * WINDOWS_IN_MEMORY * job.config.shard_bytes * len(job.capture.sites))


def refuse_full_disk(job: Job, survey: Survey, already_stored: int, free: int | None) -> None:
    """Raises RunError when the run cannot fit on the disk."""
    needed = disk_needed(job, survey.tokens) - already_stored
    if free is not None and needed > free:
        raise RunError(
            f"the run needs about {format_bytes(needed)} below {job.config.output_dir}, where {format_bytes(free)} "
            "are free: capture fewer layers, use another --output_dir, or --upload_to_gcs --delete_local_after_upload"
        ) from OSError(errno.ENOSPC, "disk full")


@dataclass(frozen=True)
class PlanReport:
    """What `--plan` prints. `padding_waste` is the share of computed tokens that belong to no sample."""

    samples: int
    tokens: int
    truncated: int
    bad_records: int
    padding_waste: float
    steps: int
    shards: int
    bytes_on_disk: int
    free_disk_bytes: int | None
    fits_on_disk: bool
    seconds_per_step: float
    tokens_per_second: float
    estimated_seconds: float

    @property
    def exit_code(self) -> int:
        """1 when the run would not fit on the disk."""
        return 0 if self.fits_on_disk else 1

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The plan for people."""
        free = "unbounded" if self.free_disk_bytes is None else format_bytes(self.free_disk_bytes)
        return [
            f"samples          {self.samples} ({self.truncated} truncated, {self.bad_records} bad records)",
            f"tokens           {self.tokens}",
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


def plan_run(
    job: Job, windows: Iterator[Window], step: ExtractionStep, shape: BatchShape, free: int | None
) -> PlanReport:
    """Lays `windows` (of one stream, or of all shards) out exactly as the run would, and times one step."""
    first = next(windows, None)
    if first is None:
        raise RunError(f"{job.stream_path}: no sample to extract")
    timed = plan_steps(first.lengths, shape)[0]
    seconds, ratio = time_step(job, step, first, timed)
    totals = _Totals()
    for window in itertools.chain([first], windows):
        totals.add(window, plan_steps(window.lengths, shape))
    rate = timed.n_rows * timed.length / seconds
    needed = disk_needed(job, totals.tokens, ratio)
    return PlanReport(
        samples=totals.samples,
        tokens=totals.tokens,
        truncated=totals.truncated,
        bad_records=totals.bad_records,
        padding_waste=round(1 - totals.tokens / totals.computed, 4),
        steps=totals.steps,
        shards=totals.windows,
        bytes_on_disk=stored_bytes(job, totals.tokens, ratio),
        free_disk_bytes=free,
        fits_on_disk=free is None or needed <= free,
        seconds_per_step=round(seconds, 4),
        tokens_per_second=round(totals.tokens / (totals.computed / rate), 1),
        estimated_seconds=round(totals.computed / rate, 2),
    )


@dataclass
class _Totals:
    windows: int = 0
    samples: int = 0
    tokens: int = 0
    truncated: int = 0
    bad_records: int = 0
    steps: int = 0
    computed: int = 0

    def add(self, window: Window, steps: list[Step]) -> None:
        self.windows += 1
        self.samples += len(window.samples)
        self.tokens += window.n_tokens
        self.truncated += sum(sample.full_length > len(sample.token_ids) for sample in window.samples)
        self.bad_records += len(window.bad_records)
        self.steps += len(steps)
        self.computed += sum(step.n_rows * step.length for step in steps)


def time_step(job: Job, step: ExtractionStep, window: Window, planned: Step) -> tuple[float, float]:
    """Seconds of one step after compilation, and stored over raw bytes of what it gives."""
    arrays = step_arrays(planned, [sample.token_ids for sample in window.samples])
    jax.block_until_ready(step(arrays).activations)
    started = time.monotonic()
    output = step(arrays)
    activations = {site: np.asarray(values) for site, values in output.activations.items()}
    seconds = time.monotonic() - started
    if not job.config.gzipped:
        return seconds, 1.0
    first_row = next(iter(activations.values()))[:, 0]
    raw = np.ascontiguousarray(first_row).tobytes()[: 4 * BLOCK_BYTES]
    return seconds, len(deflate_block(raw)) / len(raw)
