"""The engine: windows through the device to committed shards, all stages at once.

read      stream → prompts → tokens → windows            a thread
forward   windows → packed steps → device                the main thread; timed on the device
copy      device → window buffers on the host            a thread
encode    window buffers → finished files                a pool
store     upload, commit record, index, checkpoint       a pool, and a thread that commits in order
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import jax
import numpy as np

from core.activation_storage import ActivationStorage, CommitRecord, StoredFile
from core.batching import BatchShape, Step, plan_steps, sample_spans, step_arrays
from core.errors import RunError
from core.formats import DTYPES
from core.jax_utils import ExtractionStep, StepOutput
from core.job import Job
from core.pipeline import Channel, Pipeline, StageClock
from core.progress import Progress
from core.shard_encoding import ShardEncoder, WindowActivations
from core.windows import StreamPlace, Window

# One window fills while others are encoded: what bounds host memory is this many times the shard size.
WINDOWS_IN_MEMORY = 3
# Windows between the last step and their commit record; files wait on disk, not in memory.
_WINDOWS_IN_STORAGE = 4
_STEPS_IN_FLIGHT = 1


@dataclass
class WindowBuffer:
    """A window whose activations arrive step by step, scattered to where each sample belongs."""

    activations: WindowActivations
    steps_left: int

    @classmethod
    def allocate(cls, job: Job, window: Window, n_steps: int) -> "WindowBuffer":
        """Room for every site: (L, N, D) in the stored dtype."""
        shape = (len(job.capture.layers), window.n_tokens, job.model.d_model)
        arrays = {site: np.empty(shape, DTYPES[job.config.dtype]) for site in job.capture.sites}
        return cls(WindowActivations(window, job.capture.layers, arrays), n_steps)

    def scatter(self, step: Step, output: StepOutput) -> None:
        """Copies the samples of one step to their places; waits for the device."""
        window, offsets = self.activations.window, self.activations.offsets
        for site, buffer in self.activations.by_site.items():
            values = np.asarray(output.activations[site])
            for row, sample, start, stop in sample_spans(step, window.lengths):
                buffer[:, offsets[sample] : offsets[sample + 1]] = values[:, row, start:stop]
        self.steps_left -= 1


@dataclass(frozen=True)
class StepInFlight:
    """A step the device is working on."""

    buffer: WindowBuffer
    step: Step
    output: StepOutput
    started: float


@dataclass
class Extraction:
    """One run of a job over what its storage does not hold yet.

    Attributes:
      stop: set it to end the run early: what is computed is committed, the window under way is dropped.
      on_commit: called after each commit, in order.
    """

    job: Job
    storage: ActivationStorage
    step: ExtractionStep
    shape: BatchShape
    encoder: ShardEncoder
    progress: Progress
    pipeline: Pipeline
    stop: threading.Event
    on_commit: Callable[[CommitRecord], None]
    _buffers: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(WINDOWS_IN_MEMORY))
    _device_free_at: float = 0.0

    def run(self, windows: Iterator[Window]) -> None:
        """Runs all stages to the end of `windows`; raises the first error of any of them."""
        pipeline = self.pipeline
        read: Channel[Window] = pipeline.channel(1)
        steps: Channel[StepInFlight] = pipeline.channel(_STEPS_IN_FLIGHT)
        encoded: Channel[tuple[Window, Future[list[StoredFile]]]] = pipeline.channel(_WINDOWS_IN_STORAGE)
        pool = ThreadPoolExecutor(_WINDOWS_IN_STORAGE, "encode")
        pipeline.start("read", lambda clock: self._read(windows, read, clock))
        pipeline.start("copy", lambda clock: self._copy(steps, encoded, pool, clock))
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
                pool.shutdown(cancel_futures=True)

    def _read(self, windows: Iterator[Window], read: Channel[Window], clock: StageClock) -> None:
        for window in windows:
            if self.stop.is_set():
                break
            read.put(window, clock)
        read.close()

    def _forward(self, read: Channel[Window], steps: Channel[StepInFlight], clock: StageClock) -> None:
        for window in read.drain(clock):
            # A run that is stopped still empties the channel: the reader may be waiting for room in it.
            if not self.stop.is_set():
                self._forward_window(window, steps, clock)

    def _forward_window(self, window: Window, steps: Channel[StepInFlight], clock: StageClock) -> None:
        planned = plan_steps(window.lengths, self.shape)
        self._acquire_buffer()
        buffer = WindowBuffer.allocate(self.job, window, len(planned))
        token_ids = [sample.token_ids for sample in window.samples]
        for step in planned:
            if self.stop.is_set():
                return
            started = time.monotonic()
            output = self.step(step_arrays(step, token_ids))
            output.copy_to_host_async()
            steps.put(StepInFlight(buffer, step, output, started), clock)

    def _acquire_buffer(self) -> None:
        while not self._buffers.acquire(timeout=0.1):
            self.pipeline.check()

    def _copy(
        self,
        steps: Channel[StepInFlight],
        encoded: Channel[tuple[Window, Future[list[StoredFile]]]],
        pool: ThreadPoolExecutor,
        clock: StageClock,
    ) -> None:
        for flight in steps.drain(clock):
            self._wait_for_device(flight, clock)
            check_peaks(flight, self.job)
            flight.buffer.scatter(flight.step, flight.output)
            spans = [sample for row in flight.step.rows for sample in row.samples]
            lengths = flight.buffer.activations.window.lengths
            self.progress.computed(len(spans), sum(lengths[sample] for sample in spans))
            if not flight.buffer.steps_left:
                window = flight.buffer.activations.window
                encoded.put((window, pool.submit(self._encode_and_store, flight.buffer.activations)), clock)
            del flight
        encoded.close()

    def _wait_for_device(self, flight: StepInFlight, clock: StageClock) -> None:
        """Waits for the step, and counts the time as the device's rather than the copy's."""
        waiting_since = time.monotonic()
        jax.block_until_ready((flight.output.activations, flight.output.peaks))
        ready = time.monotonic()
        clock.waiting += ready - waiting_since
        self.pipeline.clock("forward").add_busy(ready - max(flight.started, self._device_free_at))
        self._device_free_at = ready

    def _encode_and_store(self, activations: WindowActivations) -> list[StoredFile]:
        started = time.monotonic()
        try:
            files = self.encoder.encode(activations)
        finally:
            # Files wait for their upload on disk: the arrays go before it, and another window may fill.
            activations.by_site.clear()
            self._buffers.release()
        self.pipeline.clock("encode").add_busy(time.monotonic() - started)
        started = time.monotonic()
        try:
            stored = [self.storage.store(activations.window.index, file) for file in files]
        finally:
            for file in files:
                file.path.unlink(missing_ok=True)
        self.pipeline.clock("store").add_busy(time.monotonic() - started)
        return stored

    def _commit(self, encoded: Channel[tuple[Window, Future[list[StoredFile]]]], clock: StageClock) -> None:
        for window, future in encoded.drain(clock):
            record = self.storage.commit(self._record(window, future.result()))
            self.progress.committed(record)
            self.on_commit(record)
            del window, future

    def _record(self, window: Window, files: list[StoredFile]) -> CommitRecord:
        return CommitRecord(
            window=window.index,
            plan_hash=self.storage.plan_hash,
            stream_hash=self.storage.stream_hash,
            first_sample_idx=window.samples[0].sample_idx,
            last_sample_idx=window.samples[-1].sample_idx,
            next_place=window.next_place,
            n_samples=len(window.samples),
            n_tokens=window.n_tokens,
            n_truncated=sum(sample.full_length > len(sample.token_ids) for sample in window.samples),
            samples_per_record=window.samples_per_record,
            sites=self.job.capture.sites,
            layers=self.job.capture.layers,
            widths=dict.fromkeys(self.job.capture.sites, self.job.model.d_model),
            dtype=self.job.config.dtype,
            files=tuple(files),
            bad_records=tuple(asdict(bad) for bad in window.bad_records),
        )


def check_peaks(flight: StepInFlight, job: Job) -> None:
    """Raises RunError when a value is NaN, infinite or too large for the stored dtype, naming where it is."""
    limit = float(np.finfo(DTYPES[job.config.dtype]).max) if job.config.dtype != "bfloat16" else 3.38e38
    for site, device_peaks in flight.output.peaks.items():
        peaks = np.asarray(device_peaks)
        for slot, row in np.argwhere(~(peaks <= limit)):
            sample = _sample_at_fault(flight, site, int(slot), int(row))
            where = f"{job.stream_path}, sample_idx {sample}, {site} after layer {job.capture.layers[slot]}"
            if np.isfinite(peaks[slot, row]):
                raise RunError(
                    f"{where}: magnitude {peaks[slot, row]:.0f} does not fit {job.config.dtype} (at most {limit:.0f}): "
                    "store with --dtype bfloat16 or --dtype float32"
                )
            raise RunError(f"{where}: the model computes NaN or infinity: try --compute_dtype float32")


def _sample_at_fault(flight: StepInFlight, site: str, slot: int, row: int) -> int:
    window = flight.buffer.activations.window
    values = np.abs(np.asarray(flight.output.activations[site][slot, row]).astype(np.float32))
    spans = [span for span in sample_spans(flight.step, window.lengths) if span[0] == row]
    peaks = [np.nan_to_num(values[start:stop], nan=np.inf).max() for _, _, start, stop in spans]
    return window.samples[spans[int(np.argmax(peaks))][1]].sample_idx


def resume_place(records: Sequence[CommitRecord]) -> tuple[StreamPlace | None, int, int]:
    """Where to go on behind committed windows: the place in the stream, the next window, bad records so far."""
    if not records:
        return None, 1, 0
    return records[-1].next_place, records[-1].window + 1, sum(len(record.bad_records) for record in records)


def is_complete(records: Sequence[CommitRecord]) -> bool:
    """Whether the last committed window ends the stream."""
    return bool(records) and records[-1].next_place is None
