"""Passes over numbers, that need no shards: what tests of the runners map."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from analysis.passes import PartFacts, PartialStore, RunnerChoice, run_pass
from core.base.errors import RunError

WIDTH = 300


@dataclass(frozen=True)
class MatrixSum:
    """Part i is a random matrix M; the partial is the sum of M M^T, whose bits depend on every order.

    Attributes:
      log: a folder in which each part that is mapped leaves a file.
      bad: the part that cannot be read. slow_s: how long part 0 takes more. pause_s: how long each takes.
    """

    log: str | None = None
    bad: int | None = None
    slow_s: float = 0.0
    pause_s: float = 0.0
    width: int = WIDTH
    name: str = "matrix-sum"
    version: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)

    def facts(self, part: int) -> PartFacts:
        return PartFacts(f"part {part}", 100, {"part": part})

    def map(self, part: int) -> np.ndarray:
        if part == self.bad:
            raise RunError(f"out/part_{part} cannot be read: inspect it")
        time.sleep(self.pause_s + (self.slow_s if part == 0 else 0))
        if self.log is not None:
            Path(self.log, f"{part}-{os.getpid()}-{time.monotonic_ns()}").touch()
        matrix = np.random.default_rng(part).normal(size=(self.width, 2 * self.width))
        return matrix @ matrix.T

    def merge(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + b

    def finish(self, partial: np.ndarray) -> bytes:
        return partial.tobytes()

    def pack(self, partial: np.ndarray) -> bytes:
        return partial.tobytes()

    def unpack(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.float64).reshape(self.width, self.width)

    def mapped(self) -> list[int]:
        """The parts that were mapped, once for each time."""
        assert self.log is not None
        return sorted(int(path.name.partition("-")[0]) for path in Path(self.log).iterdir())


def summed(wish: dict[str, Any]) -> int:
    """In a fork: runs the pass and writes its result."""
    result = run_pass(
        MatrixSum(log=wish["log"]),
        range(wish["parts"]),
        partials=PartialStore(wish["partials"]),
        runner=RunnerChoice(*wish["runner"]),
        block=wish["block"],
    )
    Path(wish["result"]).write_bytes(result)
    return 0
