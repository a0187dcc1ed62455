"""Where the parts of a pass are mapped: in this process, in threads, in other processes, or on a Ray cluster."""

from analysis.passes.runners.base import Runner
from analysis.passes.runners.choice import RUNNERS, RunnerChoice

__all__ = ["RUNNERS", "Runner", "RunnerChoice"]
