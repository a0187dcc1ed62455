"""The upload rate of a run, which also encodes, digests and commits, compared with an upload alone."""

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common.engine import Engine
from benchmarks.common.measuring import Ratio, Timings
from benchmarks.storage.bucket import bucket_server
from core.base.errors import RunError
from core.object_store import Created, ObjectInfo, ObjectStore, file_info, open_store

# As many as a run has in flight.
_UPLOADS_AT_ONCE = 4


@dataclass(frozen=True)
class Busy:
    """Busy cores while a side ran: CPU time over wall time.

    Attributes:
      ours: of the measured process; server: of the fake bucket, which a real bucket would not use.
    """

    ours: float
    server: float


@dataclass(frozen=True)
class UploadResult:
    """The upload alone against a run.

    Attributes:
      link_mb_s: 0: the speed of loopback.
      ratio: the time of the upload alone over that of the run.
      cpu_allows: what `ratio` would be if only CPU time counted: CPU time of the upload alone over that of the run, of
        this process and the server, which share the cores of the machine. A run also encodes and digests.
    """

    link_mb_s: float
    files: int
    bytes: int
    raw_mb_s: float
    run_mb_s: float
    ratio: Ratio
    raw_busy: Busy
    run_busy: Busy
    cpu_allows: float


@dataclass(frozen=True)
class _Side:
    """One of the two, its timings and the server's CPU seconds."""

    work: Callable[[str], object]
    timings: Timings = field(default_factory=Timings)
    server_cpu: list[float] = field(default_factory=list)

    def run(self, link_mb_s: float) -> None:
        """Adds a repetition, into a new bucket: objects that the server keeps in memory would slow later ones."""
        with bucket_server(link_mb_s) as bucket:
            before = bucket.cpu_seconds()
            self.timings.run(lambda: self.work(bucket.url))
            self.server_cpu.append(bucket.cpu_seconds() - before)

    def cpu_seconds(self) -> float:
        """CPU seconds of both processes, by the medians."""
        return statistics.median(self.timings.cpu) + statistics.median(self.server_cpu)

    def busy(self) -> Busy:
        """Busy cores, by the medians."""
        wall = statistics.median(self.timings.wall)
        ours, server = statistics.median(self.timings.cpu) / wall, statistics.median(self.server_cpu) / wall
        return Busy(round(ours, 2), round(server, 2))


def measure_upload(engine: Engine, stored: Sequence[Path], link_mb_s: float, repeats: int) -> UploadResult:
    """Alternately uploads files that `engine` stored before, and runs the engine with the bucket as output.

    The engine's device should take no time (`benchmarks.common.replay`), or this would measure the device.
    """
    files = {path: file_info(path) for path in stored}
    million = sum(info.size for info in files.values()) / 1e6
    raw = _Side(lambda url: upload(files, open_store(f"{url}/raw")))
    run = _Side(lambda url: engine.run(f"{url}/run"))
    _Side(run.work).run(link_mb_s)
    for repeat in range(repeats):
        for side in (raw, run) if repeat % 2 else (run, raw):
            side.run(link_mb_s)
    return UploadResult(
        link_mb_s=link_mb_s,
        files=len(files),
        bytes=sum(info.size for info in files.values()),
        raw_mb_s=round(million / raw.timings.seconds, 1),
        run_mb_s=round(million / run.timings.seconds, 1),
        ratio=Ratio.of(raw.timings, run.timings),
        raw_busy=raw.busy(),
        run_busy=run.busy(),
        cpu_allows=round(raw.cpu_seconds() / run.cpu_seconds(), 3),
    )


def upload(files: dict[Path, ObjectInfo], store: ObjectStore) -> None:
    """Every file under its name, several at once."""
    with ThreadPoolExecutor(_UPLOADS_AT_ONCE) as pool:
        outcomes = pool.map(lambda item: store.create_file(item[0].name, *item), files.items())
        check_created(list(outcomes))


def check_created(outcomes: Sequence[Created]) -> None:
    """Raises RunError when a name existed already: then less was uploaded than is counted."""
    if any(outcome is not Created.CREATED for outcome in outcomes):
        raise RunError("the bucket of the benchmark held a file already")
