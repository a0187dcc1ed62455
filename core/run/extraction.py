"""The engine: windows through the device to committed shards, all stages at once.

read      stream → prompts → tokens → windows            a thread
forward   windows → packed steps → device                the main thread, and threads of the device
select    norms → which tokens are stored                a thread, only where norms decide
copy      device → arrays of windows on the host         a thread
encode    arrays of windows → finished files             a pool
store     upload, record, folder metadata, checkpoint    a pool, and a thread that commits in order
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from core.activation_storage import ActivationStorage
from core.base.dtypes import DTYPES
from core.base.errors import RunError
from core.commit.record import CommitRecord, PartCounts, StoredFile, StoredPart, StoredSite
from core.hosts.session import HostSession
from core.reduce.losses import Losses, total_losses
from core.reduce.pooling import fetch_rows
from core.reduce.reducer import Reducer
from core.reduce.reductions import Reduction
from core.run.job import Job
from core.run.pipeline import Channel, Pipeline, StageClock
from core.run.progress import Progress
from core.samples.selection import count_reasons
from core.samples.window_parts import PartOfWindow
from core.samples.windows import StreamPlace, TokenizedSample, Window
from core.shards.encoding import ShardEncoder
from core.shards.window_activations import WindowActivations
from core.step.backend import Step, StepOutput
from core.step.fetching import Fetch
from core.step.gathering import gather
from core.step.host_copies import begin_copies, begin_copy, on_host, wait_for
from core.step.layout import StepArrays, StepLayout, step_arrays
from core.step.peaks import Peaks, first_unfit_row, largest_of
from qwen2_jax.taps import SITES

# One window fills while others are encoded: what bounds host memory is this many times the shard size.
WINDOWS_IN_MEMORY = 3
# Windows between the last step and their commit record; files wait on disk, not in memory.
_WINDOWS_IN_STORAGE = 4
_STEPS_IN_FLIGHT = 1


@dataclass(frozen=True)
class StepInFlight:
    """A step that the device computes.

    Attributes:
      output: the step's output; after selection, the pending host copy of its fetched part.
      fetch: the tokens that are copied and the rows that are stored; None until norms have decided.
    """

    part: PartOfWindow
    activations: WindowActivations
    layout: StepLayout
    output: Future[StepOutput]
    started: float
    fetch: Fetch | None = None


@dataclass
class Extraction:
    """One run of a job over the windows that its storage lacks.

    Attributes:
      reduce: the reduction of step outputs; None: they are stored as they are.
      session: the session of the hosts of a slice. Its `stop` ends the run early: computed windows are committed, the
        unfinished one is dropped.
      on_commit: called after each commit, in order.
    """

    job: Job
    storage: ActivationStorage
    step: Step
    reduce: Reducer | None
    encoder: ShardEncoder
    progress: Progress
    pipeline: Pipeline
    session: HostSession
    on_commit: Callable[[CommitRecord], None]
    _buffers: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(WINDOWS_IN_MEMORY))
    _device_free_at: float = 0.0
    _lanes: int = field(init=False)
    _device: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self._lanes = self.job.backend.lanes(self.job.model, self.job.step_request)
        self._device = ThreadPoolExecutor(self._lanes, "device")

    def run(self, windows: Iterator[Window]) -> None:
        """Runs all stages to the end of `windows`; raises the first error of any of them."""
        pipeline = self.pipeline
        read: Channel[Window] = pipeline.channel(1)
        steps: Channel[StepInFlight] = pipeline.channel(_STEPS_IN_FLIGHT)
        encoded: Channel[tuple[PartOfWindow, Future[StoredPart]]] = pipeline.channel(_WINDOWS_IN_STORAGE)
        pool = ThreadPoolExecutor(_WINDOWS_IN_STORAGE, "encode")
        pipeline.start("read", lambda clock: self._read(windows, read, clock))
        selected = self._start_select(steps)
        pipeline.start("copy", lambda clock: self._copy(selected, encoded, pool, clock))
        pipeline.start("commit", lambda clock: self._commit(encoded, clock))
        try:
            self._forward(read, steps, StageClock("dispatch"))
        except BaseException as error:
            pipeline.fail(error)
        finally:
            steps.close()
            try:
                pipeline.join()
            finally:
                for threads in (self._device, pool):
                    threads.shutdown(cancel_futures=True)

    def _read(self, windows: Iterator[Window], read: Channel[Window], clock: StageClock) -> None:
        for window in windows:
            if self.session.stop.is_set():
                break
            read.put(window, clock)
        read.close()

    def _forward(self, read: Channel[Window], steps: Channel[StepInFlight], clock: StageClock) -> None:
        for window in read.drain(clock):
            # A run that is stopped still empties the channel: the reader may be waiting for room in it.
            for part in self.job.parts_of(window):
                if not self.session.stop.is_set():
                    self._forward_part(part, steps, clock)

    def _forward_part(self, part: PartOfWindow, steps: Channel[StepInFlight], clock: StageClock) -> None:
        self._acquire_buffer()
        layouts = self.job.layouts_of(part)
        activations = self._allocate(part, len(layouts))
        token_ids = [sample.token_ids for sample in part.own.samples]
        for layout in layouts:
            if self.session.stop.is_set():
                return
            started, arrays = time.monotonic(), step_arrays(layout, token_ids)
            if self._norms_decide:
                output = self._device.submit(self._compute, arrays)
                flight = StepInFlight(part, activations, layout, output, started)
            else:
                fetch = self._fetch_rows(layout, activations)
                output = self._device.submit(self._compute_and_copy, arrays, fetch)
                flight = StepInFlight(part, activations, layout, output, started, fetch)
            if self._lanes == 1:
                wait([output])  # a queued step would still be computed after the run is stopped
            steps.put(flight, clock)

    def _allocate(self, part: PartOfWindow, n_steps: int) -> WindowActivations:
        number = part.part if self.job.identity.parts > 1 else None
        return WindowActivations.allocate(part.own, self.job.layers, self.job.stored, n_steps, number)

    def _fetch_rows(self, layout: StepLayout, activations: WindowActivations) -> Fetch:
        return fetch_rows(layout, activations.samples, activations.window.lengths, self.job.pools)

    def _compute(self, arrays: StepArrays) -> StepOutput:
        """Starts a step and the copy of its norms; this and the next two methods run in a thread of the device."""
        output = self.step(arrays)
        return replace(output, norms={site: begin_copy(norms) for site, norms in output.norms.items()})

    def _compute_and_copy(self, arrays: StepArrays, fetch: Fetch) -> StepOutput:
        return self._begin_copy(self.step(arrays), fetch)

    def _begin_copy(self, output: StepOutput, fetch: Fetch) -> StepOutput:
        """Starts to copy the fetched part of a step to the host. The rest can be freed on the device."""
        output = gather(output, fetch.gathered)
        if self.reduce is not None and self.job.backend.reduces_on_device:
            output = self.reduce(output, fetch)
        return begin_copies(output)

    def _acquire_buffer(self) -> None:
        while not self._buffers.acquire(timeout=0.1):
            self.pipeline.check()

    @property
    def _norms_decide(self) -> bool:
        return self.job.selection is not None and self.job.selection.needs_norms

    def _start_select(self, steps: Channel[StepInFlight]) -> Channel[StepInFlight]:
        """If norms decide, an extra stage starts the copy of a step while the step before is being copied."""
        if not self._norms_decide:
            return steps
        selected: Channel[StepInFlight] = self.pipeline.channel(_STEPS_IN_FLIGHT)
        self.pipeline.start("select", lambda clock: self._select(steps, selected, clock))
        return selected

    def _select(self, steps: Channel[StepInFlight], selected: Channel[StepInFlight], clock: StageClock) -> None:
        selection = self.job.selection
        assert selection is not None
        for flight in steps.drain(clock):
            output = self._wait_for_device(flight, clock)
            norms = {site: np.asarray(norms) for site, norms in output.norms.items()}
            flight.activations.select(flight.layout, norms, selection)
            fetch = self._fetch_rows(flight.layout, flight.activations)
            copying = self._device.submit(self._begin_copy, output, fetch)
            # Drop references so the full output is freed while waiting.
            flight = replace(flight, output=copying, fetch=fetch)
            del output
            selected.put(flight, clock)
            del flight
        selected.close()

    def _copy(
        self,
        steps: Channel[StepInFlight],
        encoded: Channel[tuple[PartOfWindow, Future[StoredPart]]],
        pool: ThreadPoolExecutor,
        clock: StageClock,
    ) -> None:
        for flight in steps.drain(clock):
            self._store_rows(flight, clock)
            part, activations = flight.part, flight.activations
            if not activations.steps_left:
                activations.finish()
                encoded.put((part, pool.submit(self._encode_and_store, part, activations)), clock)
            del flight, part, activations
        encoded.close()

    def _store_rows(self, flight: StepInFlight, clock: StageClock) -> None:
        """Scatters the output of a step into the arrays of its window, once it is copied and checked."""
        fetch, activations = flight.fetch, flight.activations
        assert fetch is not None
        output = self._on_host(flight, fetch, clock)
        check_peaks(flight, fetch, output.peaks, self.job)
        activations.scatter(fetch, output.arrays)
        if self._codes_rows:
            activations.losses.add(output.losses)
        lengths = [len(activations.samples[sample].token_ids) for sample in fetch.samples]
        self.progress.computed(len(lengths), sum(lengths))

    def _on_host(self, flight: StepInFlight, fetch: Fetch, clock: StageClock) -> StepOutput:
        """The output of a step, on the host."""
        output = on_host(flight.output.result() if self._norms_decide else self._wait_for_device(flight, clock))
        if self.reduce is not None and not self.job.backend.reduces_on_device:
            output = on_host(self.reduce(output, fetch))
        return output

    def _wait_for_device(self, flight: StepInFlight, clock: StageClock) -> StepOutput:
        """Waits for the step, and counts the time as the device's rather than the copy's."""
        waiting_since = time.monotonic()
        output = flight.output.result()
        wait_for(output.norms if flight.fetch is None else output.peaks)
        ready = time.monotonic()
        clock.waiting += ready - waiting_since
        self.pipeline.clock("forward").add_busy(ready - max(flight.started, self._device_free_at))
        self._device_free_at = ready
        return output

    def _encode_and_store(self, part: PartOfWindow, activations: WindowActivations) -> StoredPart:
        started = time.monotonic()
        try:
            files = self.encoder.encode(activations)
        finally:
            # Files wait for their upload on disk: the arrays go before it, and another window may fill.
            activations.arrays.clear()
            self._buffers.release()
        self.pipeline.clock("encode").add_busy(time.monotonic() - started)
        started = time.monotonic()
        try:
            stored = [self.storage.store(activations.window.index, file) for file in files]
        finally:
            for file in files:
                file.path.unlink(missing_ok=True)
        self.pipeline.clock("store").add_busy(time.monotonic() - started)
        lost = activations.losses.of_rows(activations.window.n_rows, activations.layers)
        return _stored_part(part.part, activations.window, stored, lost)

    def _commit(self, encoded: Channel[tuple[PartOfWindow, Future[StoredPart]]], clock: StageClock) -> None:
        is_whole, stored = True, list[StoredPart]()
        for part, future in encoded.drain(clock):
            gathered = self.session.gather(f"stored/{part.window.index}/{part.turn}", asdict(future.result()))
            # After a dropped window no later one may commit.
            is_whole &= gathered is not None
            stored += [StoredPart.from_json(fields) for fields in gathered or ()]
            if part.is_last:
                self._commit_window(part.window, stored if is_whole else None)
                stored = []
            del part, future

    def _commit_window(self, window: Window, stored: list[StoredPart] | None) -> None:
        """Commits a window on the host that has gathered its parts; the others wait for its record.

        stored: None when a host has ended without its part.
        """
        key = f"committed/{window.index}"
        if self.session.hosts.is_first:
            record = None if stored is None else self.storage.commit(self._record(window, stored))
            self.session.try_broadcast(key, None if record is None else record.to_bytes().decode())
            self.session.delete(f"committed/{window.index - 1}")
        else:
            shared = self.session.try_broadcast(key, None)
            record = None if shared is None else self.storage.add_record(CommitRecord.from_bytes(shared.encode()))
        if record is not None:
            self.progress.committed(record)
            self.on_commit(record)

    def _record(self, window: Window, stored: list[StoredPart]) -> CommitRecord:
        parts = sorted((part for part in stored if part.number is not None), key=lambda part: part.number or 0)
        counts = {part.number: part.counts for part in parts}
        n_parts, nothing = self.job.identity.parts, PartCounts(None, None, 0, 0)
        dropped: Counter[str] = Counter()
        for part in parts:
            dropped.update(part.n_dropped)
        return CommitRecord.of_window(
            window,
            (self.storage.plan_hash, self.storage.stream_hash),
            self._stored_sites(),
            self.job.stored_dtype,
            tuple(file for part in parts for file in part.files),
            n_tokens=sum(part.counts.n_tokens for part in parts),
            n_dropped=dict(dropped),
            n_empty=sum(part.n_empty for part in parts),
            pools=tuple(map(str, self.job.pools)),
            losses=total_losses((part.n_rows, part.losses) for part in parts),
            parts=tuple(counts.get(n, nothing) for n in range(n_parts)) if n_parts > 1 else (),
        )

    @property
    def _codes_rows(self) -> bool:
        return self.job.reduction is not None and self.job.reduction.codes_rows

    def _stored_sites(self) -> dict[str, StoredSite]:
        reduction, widths = self.job.reduction or Reduction(), self.job.model.site_widths
        block = reduction.quantization.block if reduction.quantization is not None else None
        return {
            site: StoredSite(
                layers,
                reduction.width(widths[site]),
                {
                    name: {"width": array.width, "dtype": array.dtype.name}
                    for name, array in self.job.stored[site].items()
                    if self._codes_rows
                },
                block,
            )
            for site, layers in self.job.layers.items()
        }


def _stored_part(number: int | None, window: Window, files: list[StoredFile], losses: Losses) -> StoredPart:
    """window: with the part's samples alone, as they were stored."""
    samples = window.samples
    first, last = (samples[0].sample_idx, samples[-1].sample_idx) if samples else (None, None)
    return StoredPart(
        number=number,
        counts=PartCounts(first, last, len(samples), window.n_stored),
        n_dropped=count_reasons(sample.reasons for sample in samples if sample.reasons is not None),
        n_empty=sum(sample.n_stored == 0 for sample in samples),
        n_rows=window.n_rows,
        files=tuple(files),
        losses=losses,
    )


def check_peaks(flight: StepInFlight, fetch: Fetch, peaks: Peaks, job: Job) -> None:
    """Raises RunError when a stored value is NaN, infinite or too large for the stored dtype, naming where it is."""
    stored = DTYPES.get(job.stored_dtype)
    # Codes have scales in float32, which fit whatever the model computes.
    limit = largest_of(np.dtype(np.float32) if stored is None else stored)
    found = first_unfit_row(peaks, fetch, limit)
    if found is None:
        return
    if not found.is_finite:
        raise RunError(_not_finite(flight, fetch, peaks, job, found.row))
    sample, place = _place_of(flight, fetch, job, found.row, found.unit)
    raise RunError(
        f"{job.stream_path}, sample_idx {sample.sample_idx}, {_stage(job, found.site, found.slot)}: "
        f"magnitude {found.peak:.0f} {place} does not fit "
        f"{job.config.dtype} (at most {limit:.0f}): store with --dtype bfloat16 or --dtype float32, or "
        "leave such tokens out, see --exclude_norm_outliers"
    )


def _not_finite(flight: StepInFlight, fetch: Fetch, peaks: Peaks, job: Job, row: int) -> str:
    """The error message for a row: it names the sample with a NaN or infinity, or the samples that may be its source.

    Attention multiplies tokens that are not seen by zero, and zero times NaN is NaN: after the next attention the
    other samples of the row have it too. The stage with the fewest affected samples is closest to the source.
    """
    found: list[tuple[str, dict[int, list[str]]]] = []
    for site, of_site in peaks.items():
        for slot, values in enumerate(of_site[:, row]):
            places: dict[int, list[str]] = {}
            for unit in np.flatnonzero(~np.isfinite(values) & fetch.is_stored[row]):
                sample, place = _place_of(flight, fetch, job, row, int(unit))
                places.setdefault(sample.sample_idx, []).append(place)
            if places:
                found.append((_stage(job, site, slot), places))
    stage, places = min(found, key=lambda item: len(item[1]))
    if len(places) == 1:
        ((sample_idx, (place, *more)),) = places.items()
        return (
            f"{job.stream_path}, sample_idx {sample_idx}, {stage}: the model computes NaN or infinity "
            f"{'first ' if more else ''}{place}: try --compute_dtype float32"
        )
    return (
        f"{job.stream_path}, one of sample_idx {', '.join(map(str, places))}, which share a row, {stage}: the model "
        "computes NaN or infinity: try --compute_dtype float32; with --no_pack the error names the sample"
    )


def _stage(job: Job, site: str, slot: int) -> str:
    return f"{site} after layer {job.layers[site][slot]}" if SITES[site].per_layer else site


def _place_of(flight: StepInFlight, fetch: Fetch, job: Job, row: int, unit: int) -> tuple[TokenizedSample, str]:
    """The sample of a stored output row, and the row's position within it, for an error message."""
    index, number = fetch.sample_at(row, unit)
    sample = flight.activations.samples[index]
    place = (
        f"in the pool {job.pools[number]} of its tokens" if job.pools else f"at token {sample.stored_places[number]}"
    )
    return sample, place


def resume_place(records: Sequence[CommitRecord]) -> tuple[StreamPlace | None, int, int]:
    """Where to continue after committed windows: the place in the stream, the next window, bad records so far."""
    if not records:
        return None, 1, 0
    return records[-1].next_place, records[-1].window + 1, sum(len(record.bad_records) for record in records)


def is_complete(records: Sequence[CommitRecord]) -> bool:
    """Whether the last committed window ends the stream."""
    return bool(records) and records[-1].next_place is None
