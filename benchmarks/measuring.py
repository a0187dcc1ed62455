"""What all benchmarks share: alternating repetitions, medians, and the machine they ran on."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "numpy", "torch", "transformers", "isal")


def alternate(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repetition of each side.

    Every round runs each side once and begins with another one, so that a machine that slows down or is shared slows
    all sides alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """How many times the seconds of one side the other takes: of the medians, and the extremes over the rounds."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, numerator: Sequence[float], denominator: Sequence[float]) -> "Ratio":
        """From the seconds of the same rounds of two sides."""
        rounds = [above / below for above, below in zip(numerator, denominator, strict=True)]
        medians = statistics.median(numerator) / statistics.median(denominator)
        return cls(round(medians, 3), round(min(rounds), 3), round(max(rounds), 3))


def median_seconds(seconds: Sequence[float]) -> float:
    """The median, rounded to milliseconds."""
    return round(statistics.median(seconds), 3)


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, and versions: what a number means nothing without."""
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
    """Aligned columns for a terminal, which are also a Markdown table."""
    cells = [list(header), *([str(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
