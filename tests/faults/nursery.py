"""Worker processes by the hundred: forks that compute with a light model.

worker = nursery.start(Worker(flags={...}, fault="commit.before@2=kill"))
worker.kill(); worker.wait()
"""

import argparse
import json
import os
import random
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forks import Fork, Forks


@dataclass(frozen=True)
class Worker:
    """What a worker is to do.

    Attributes:
      flags: of `RunConfig`.
      fault: as in the environment variable of `core.base.fault_points`.
      step_s, rounding, width, weights, stuck_after: of the light model.
      clock_s: how far the wall clock is off; clock_jumps: by how much more at some looks.
      retry: of `RetryPolicy`.
      upload_chunk: bytes.
      points_file: where the points that it came by are listed at its end, with how often.
      change: a name in `changes.CHANGES`.
      free_bytes: what the disk claims to have free.
    """

    flags: dict[str, Any]
    fault: str | None = None
    step_s: float = 0.0
    rounding: float = 0.0
    width: int = 8
    weights: int = 0
    stuck_after: int | None = None
    clock_s: float = 0.0
    clock_jumps: float = 0.0
    retry: dict[str, float] = field(
        default_factory=lambda: {"base_s": 0.005, "cap_s": 0.05, "connect_timeout_s": 5.0, "read_timeout_s": 5.0}
    )
    upload_chunk: int | None = None
    points_file: str | None = None
    change: str | None = None
    free_bytes: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


class Nursery:
    """Starts workers."""

    def __init__(self, forks: Forks) -> None:
        self._forks = forks

    def start(self, worker: Worker) -> Fork:
        """Starts a worker and returns at once."""
        return self._forks.start("nursery:be", asdict(worker))


def be(wish: dict[str, Any]) -> int:
    """What a fork does."""
    return work(Worker(**wish))


def work(worker: Worker) -> int:
    """Runs the command in this process, as the top-level script does; returns its exit code."""
    from absl.flags import FLAGS, argparse_flags

    import extract_activations
    from core.base import command_line

    os.environ.update(worker.environment)
    prepare(worker)
    wanted = argparse.Namespace(**worker.flags, verbose=False, json=True)
    parser = argparse_flags.ArgumentParser()
    parser.parse_args = lambda *_: FLAGS.mark_as_parsed() or wanted
    try:
        command_line.run_command(extract_activations.run_flags, lambda: parser)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def prepare(worker: Worker) -> None:
    """Makes this process the worker that is wanted."""
    from light_engine import LightBackend

    import core.object_store
    import core.object_store.gcs
    import core.run.job
    import core.run.runner
    from core.base import fault_points

    backend = LightBackend(worker.step_s, worker.rounding, worker.weights, worker.width, worker.stuck_after)
    core.run.checks.backend_of = core.run.runner.backend_of = lambda config: backend
    policy = core.object_store.RetryPolicy(**worker.retry)
    core.object_store.RetryPolicy = lambda: policy
    if worker.upload_chunk is not None:
        core.object_store.gcs.UPLOAD_CHUNK = worker.upload_chunk
    if worker.free_bytes is not None:
        core.object_store.LocalStore.free_bytes = lambda self: worker.free_bytes
    if worker.clock_s or worker.clock_jumps:
        _set_clock(worker.clock_s, worker.clock_jumps)
    if worker.change is not None:
        from changes import CHANGES

        CHANGES[worker.change]()
    if worker.fault is not None:
        fault_points.arm(fault_points.parse_fault(worker.fault))
    if worker.points_file is not None:
        fault_points.arm(_Points(Path(worker.points_file)))


class _Points:
    """Counts the points that a worker comes by."""

    def __init__(self, path: Path) -> None:
        self._path, self._counts, self._lock = path, Counter[str](), threading.Lock()

    def __call__(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1
            self._path.write_text(json.dumps(self._counts))


def _set_clock(offset: float, jump: float) -> None:
    """A wall clock that is wrong, and jumps to and fro from look to look."""
    real, rng = time.time, random.Random(os.getpid())
    time.time = lambda: real() + offset + jump * rng.randrange(2)
    time.time_ns = lambda: int(time.time() * 1e9)
