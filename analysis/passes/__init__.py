"""Passes over committed shards: `map` over every part, `merge` in a fixed order, `finish`. See docs/passes.md."""

from analysis.passes.partials import PartialStore
from analysis.passes.protocol import PartFacts, Pass
from analysis.passes.run_pass import run_pass
from analysis.passes.runners import RUNNERS, Runner, RunnerChoice

__all__ = ["RUNNERS", "PartFacts", "PartialStore", "Pass", "Runner", "RunnerChoice", "run_pass"]
