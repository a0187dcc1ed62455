"""Shared by all benchmarks: alternating repetitions, medians, and the machine they ran on."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "numpy", "torch", "transformers", "isal")


@dataclass(frozen=True)
class Timings:
    """Repetitions of one side: wall seconds, and CPU seconds of this process over all its threads.

    Other programs hardly affect CPU seconds, so they tell a noisy wall time from a slow side.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The median wall time, rounded to milliseconds."""
        return round(statistics.median(self.wall), 3)

    @property
    def cpu_seconds(self) -> float:
        """The median CPU time, rounded to microseconds."""
        return round(statistics.median(self.cpu), 6)

    def run(self, side: Callable[[], object]) -> None:
        """Adds a repetition."""
        wall, cpu = time.perf_counter(), time.process_time()
        side()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def alternate(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, Timings]:
    """The timings of each side over `repeats` rounds.

    Every round runs each side once and begins with the next side, so that a machine that slows down or is shared slows
    all sides alike.
    """
    timings = {name: Timings() for name in sides}
    names = list(sides)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            timings[name].run(sides[name])
    return timings


@dataclass(frozen=True)
class Ratio:
    """The time of one side divided by that of another.

    Attributes:
      median: ratio of the median wall times; lowest, highest: of single rounds.
      cpu: ratio of the median CPU times.
    """

    median: float
    lowest: float
    highest: float
    cpu: float

    @classmethod
    def of(cls, numerator: Timings, denominator: Timings) -> "Ratio":
        """From the same rounds of two sides."""
        rounds = [above / below for above, below in zip(numerator.wall, denominator.wall, strict=True)]
        return cls(
            median=round(statistics.median(numerator.wall) / statistics.median(denominator.wall), 3),
            lowest=round(min(rounds), 3),
            highest=round(max(rounds), 3),
            cpu=round(statistics.median(numerator.cpu) / statistics.median(denominator.cpu), 3),
        )

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lowest:.2f}-{self.highest:.2f})"


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, and versions: without them a number means nothing."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
    } | {name: version for name in _PACKAGES if (version := _version(name))}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns for a terminal; also a valid Markdown table."""
    cells = [list(header), *([str(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
