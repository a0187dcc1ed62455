"""Progress of a run for users: a bar on a terminal, a periodic log line elsewhere, metrics.jsonl and the summary."""

import json
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from core.commit.record import CommitRecord
from core.run.pipeline import Pipeline

_LINE_EVERY_S = 10.0
_BAR_EVERY_S = 0.5
# Stages overlap; the busiest one sets the pace.
STAGES = ("read", "forward", "copy", "encode", "store")


@dataclass(frozen=True)
class Summary:
    """The result of a run. Seconds are wall time; `stages` are busy seconds and may overlap.

    Attributes:
      samples, tokens, bytes, shards: of this run alone; `total_samples`, `total_shards` include earlier runs.
      tokens: that the model saw; dropped_tokens: by reason, those of them that are not stored.
      empty_samples: samples without a stored token.
      tokens_per_second: over `seconds`, which begins when the model is loaded.
    """

    status: str
    output: str
    samples: int
    tokens: int
    tokens_per_second: float
    bytes: int
    shards: int
    total_samples: int
    total_shards: int
    truncated: int
    bad_records: int
    seconds: float
    load_seconds: float
    stages: dict[str, float] = field(default_factory=dict)
    bottleneck: str | None = None
    dropped_tokens: dict[str, int] = field(default_factory=dict)
    empty_samples: int = 0

    @property
    def exit_code(self) -> int:
        """0, or that of a process ended by SIGTERM when the run was stopped early."""
        return 0 if self.status == "complete" else 128 + signal.SIGTERM

    def to_json(self) -> dict[str, Any]:
        """The summary as plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The summary as lines of text."""
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.stages.items())
        notes = [f"{self.truncated} truncated"] * bool(self.truncated)
        notes += [f"{self.bad_records} bad records set aside"] * bool(self.bad_records)
        notes += [f"tokens left out: {format_reasons(self.dropped_tokens)}"] * bool(self.dropped_tokens)
        notes += [f"{self.empty_samples} samples without a stored token"] * bool(self.empty_samples)
        return [
            f"{self.status}: {self.samples} samples, {self.tokens} tokens in {self.seconds:.1f} s "
            f"({self.tokens_per_second:.0f} tokens/s), {self.shards} shards, {format_bytes(self.bytes)}"
            + "".join(f", {note}" for note in notes),
            f"busy: {stages}; bottleneck: {self.bottleneck}" if self.stages else "nothing was left to do",
            f"output: {self.output} ({self.total_samples} samples in {self.total_shards} shards)",
        ]


@dataclass(frozen=True)
class HostExit:
    """The result of a run on any host of a slice but host 0, which returns the summary for all of them."""

    host: int
    exit_code: int

    def lines(self) -> list[str]:
        """The result as lines of text."""
        return [f"host {self.host} is done; host 0 reports on the run"]

    def to_json(self) -> None:
        """None: only host 0 prints a JSON object."""


class Progress:
    """Counts what a run has done and shows its progress.

    Args:
      pipeline: its clocks determine the bottleneck.
      expected_samples: estimate for the whole stream, including samples that are committed already.
      log: logs one line.
      metrics_path: a JSON line is appended for each commit.
      n_hosts: hosts with a part of every window; each is assumed to compute as much as this one.
      is_shown: whether this host shows progress; in a slice, host 0 does.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        expected_samples: int,
        committed_samples: int,
        log: Callable[[str], None],
        metrics_path: Path,
        n_hosts: int = 1,
        is_shown: bool = True,
    ) -> None:
        self._pipeline = pipeline
        self._expected = expected_samples
        self._committed_before = committed_samples
        self._log = log
        self._metrics_path = metrics_path
        self._n_hosts = n_hosts
        self._is_shown = is_shown
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
        self.samples_computed = self.tokens_computed = 0
        self.samples = self.tokens = self.bytes = self.shards = self.truncated = self.bad_records = 0
        self.dropped_tokens: Counter[str] = Counter()
        self.empty_samples = 0

    def __enter__(self) -> "Progress":
        if self._is_shown:
            self._ticker.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._finished.set()
        if self._is_shown:
            self._ticker.join()

    def computed(self, samples: int, tokens: int) -> None:
        """Counts samples whose activations have reached this host."""
        with self._lock:
            self.samples_computed += samples * self._n_hosts
            self.tokens_computed += tokens * self._n_hosts
            if self._n_hosts > 1:
                # Parts have about equal tokens, not samples, so the product is an estimate.
                self.samples_computed = min(self.samples_computed, self._expected - self._committed_before)

    def committed(self, record: CommitRecord) -> None:
        """Counts a committed window and appends a line of metrics."""
        with self._lock:
            self.samples += record.n_samples
            self.tokens += record.n_seen
            self.dropped_tokens.update(record.n_dropped)
            self.empty_samples += record.n_empty
            self.bytes += sum(file.bytes for file in record.files)
            self.shards += 1
            self.truncated += record.n_truncated
            self.bad_records += len(record.bad_records)
        self._write_metrics({"event": "commit", "window": record.window})

    def seconds(self) -> float:
        """Wall time since the start."""
        return time.monotonic() - self._started

    def stage_seconds(self) -> dict[str, float]:
        """Busy seconds of each stage so far."""
        return {name: round(self._pipeline.clocks[name].busy, 3) for name in STAGES if name in self._pipeline.clocks}

    def bottleneck(self) -> str | None:
        """The busiest stage so far."""
        stages = self.stage_seconds()
        return max(stages, key=lambda name: stages[name]) if stages else None

    def summary(self, **known: Any) -> Summary:
        """The final summary, also the last line of metrics."""
        seconds = self.seconds()
        summary = Summary(
            samples=self.samples,
            tokens=self.tokens,
            tokens_per_second=round(self.tokens / max(seconds, 1e-9), 1),
            bytes=self.bytes,
            shards=self.shards,
            truncated=self.truncated,
            bad_records=self.bad_records,
            seconds=round(seconds, 3),
            stages=self.stage_seconds(),
            bottleneck=self.bottleneck(),
            dropped_tokens=dict(self.dropped_tokens),
            empty_samples=self.empty_samples,
            **known,
        )
        self._write_metrics({"event": "end", "status": summary.status})
        return summary

    def _write_metrics(self, event: dict[str, Any]) -> None:
        line = event | {
            "time": time.time(),
            "seconds": round(self.seconds(), 3),
            "samples": self.samples,
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / max(self.seconds(), 1e-9), 1),
            "bytes": self.bytes,
            "shards": self.shards,
            "stages": self.stage_seconds(),
            "bottleneck": self.bottleneck(),
        }
        try:
            self._metrics_path.parent.mkdir(parents=True, exist_ok=True)
            with self._metrics_path.open("a") as metrics:
                metrics.write(json.dumps(line) + "\n")
        except OSError as error:
            self._log(f"cannot write metrics to {self._metrics_path}: {error.strerror}")

    def _tick(self) -> None:
        if sys.stderr.isatty():
            self._show_bar()
            return
        while not self._finished.wait(_LINE_EVERY_S):
            self._log(self._line())

    def _show_bar(self) -> None:
        total = max(self._expected, 1)
        with tqdm(total=total, initial=self._committed_before, unit="sample", dynamic_ncols=True) as bar:
            finished = False
            while not finished:
                finished = self._finished.wait(_BAR_EVERY_S)
                done = self._committed_before + self.samples_computed
                bar.total = max(total, done)
                bar.set_postfix_str(
                    f"{self._rate():.0f} tok/s, {format_bytes(self.bytes)} written, slowest: {self.bottleneck()}",
                    refresh=False,
                )
                bar.update(done - bar.n)
                bar.refresh()

    def _rate(self) -> float:
        return self.tokens_computed / max(self.seconds(), 1e-9)

    def _line(self) -> str:
        done = self._committed_before + self.samples_computed
        left = max(self._expected - done, 0)
        pace = self.samples_computed / max(self.seconds(), 1e-9)
        eta = f"{left / pace:.0f} s left" if pace else "no estimate yet"
        return (
            f"{done}/{max(self._expected, done)} samples, {self._rate():.0f} tokens/s, {eta}, "
            f"{format_bytes(self.bytes)} written in {self.shards} shards, slowest stage: {self.bottleneck()}"
        )


def format_reasons(counts: Mapping[str, int]) -> str:
    """`bos 3, position 120`."""
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())


def format_bytes(count: float) -> str:
    """Bytes as text, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"
