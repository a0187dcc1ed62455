"""Windows in parts: the share of a window that each host of a slice computes and writes.

A part is a run of consecutive samples; the parts of a window hold about the same number of tokens. Their number is in
the run's identity and does not depend on how many hosts there are: with as many hosts as parts each computes one part,
with fewer hosts each computes several in turn.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from core.samples.windows import Window


@dataclass(frozen=True)
class PartOfWindow:
    """The part of a window that a host computes in one turn.

    Attributes:
      window: the whole window. turn: counts from 0.
      part: the index of the part; None if no part is left for this host in this turn.
      own: the window with only the part's samples, which may be none.
    """

    window: Window
    turn: int
    part: int | None
    own: Window
    is_last: bool


def part_ranges(lengths: Sequence[int], n_parts: int) -> list[range]:
    """Cuts the samples of a window, of `lengths` tokens, into runs; a sample's middle token decides its part."""
    ends = np.cumsum(lengths, dtype=np.int64)
    middles = 2 * ends - np.asarray(lengths)
    part_of = np.minimum(middles * n_parts // (2 * max(int(ends[-1]), 1)), n_parts - 1)
    bounds = np.searchsorted(part_of, np.arange(n_parts + 1))
    return [range(int(start), int(stop)) for start, stop in itertools.pairwise(bounds)]


def parts_of_window(window: Window, *, n_parts: int, host: int = 0, n_hosts: int = 1) -> Iterator[PartOfWindow]:
    """The turns of host `host`."""
    ranges = part_ranges(window.lengths, n_parts)
    turns = [range(first, min(first + n_hosts, n_parts)) for first in range(0, n_parts, n_hosts)]
    # All hosts skip a turn without samples.
    turns = [parts for parts in turns if any(ranges[part] for part in parts)]
    for turn, parts in enumerate(turns):
        part = parts[host] if host < len(parts) else None
        samples = range(0) if part is None else ranges[part]
        is_whole = len(samples) == len(window.samples)
        own = window if is_whole else replace(window, samples=window.samples[samples.start : samples.stop])
        yield PartOfWindow(window, turn, part, own, is_last=turn == len(turns) - 1)
