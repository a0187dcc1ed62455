"""Where blocks are mapped: in this process, in threads, in other processes, or on the machines of a Ray cluster."""

import os
from dataclasses import dataclass

from analysis.passes.runners.base import Runner
from analysis.passes.runners.local import LocalRunner, ThreadRunner
from analysis.passes.runners.processes import ProcessRunner
from analysis.passes.runners.ray_cluster import RayRunner
from core.base.errors import UsageError

RUNNERS = ("local", "threads", "processes", "ray")


@dataclass(frozen=True)
class RunnerChoice:
    """How a pass runs, by plain values.

    Attributes:
      name: one of `RUNNERS`.
      workers: threads, processes or, with Ray, tasks at once; None: one for each core (Ray: for each core of the
        cluster).
      ray_address: of the cluster, such as `auto` or `ray://head:10001`; None: the one of the environment, else a new
        one on this machine.
    """

    name: str = "local"
    workers: int | None = None
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if self.name not in RUNNERS:
            raise UsageError(f"runner {self.name!r}: expected one of {', '.join(RUNNERS)}")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers is {self.workers}: expected at least 1")
        if self.name == "local" and (self.workers or 1) > 1:
            raise UsageError("runner local has one worker: choose threads, processes or ray for more")
        if self.ray_address is not None and self.name != "ray":
            raise UsageError("ray_address needs runner ray")

    def open(self, n_items: int) -> Runner:
        """The runner for so many items. Raises RunError where Ray is chosen and not installed."""
        workers = min(self.workers or len(os.sched_getaffinity(0)), n_items)
        if self.name == "ray":
            return RayRunner(self.ray_address, self.workers)
        if self.name == "processes":
            return ProcessRunner(workers)
        return ThreadRunner(workers) if self.name == "threads" else LocalRunner()
