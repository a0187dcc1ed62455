"""Windows in parts: what each host of a slice computes and writes of a window.

A part is a run of consecutive samples; the parts of a window hold about the same number of tokens. How many there are
is part of the run's plan, and so is not up to the hosts that happen to work: with as many hosts as parts each takes
one, with fewer they take turns.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from core.batching import BatchShape, Step, plan_steps_together
from core.windows import Window


@dataclass(frozen=True)
class PartOfWindow:
    """What a host computes of a window at one turn; several hosts run the same `steps` then, each with its samples.

    Attributes:
      window: the whole window. turn: counts from 0.
      part: the number of the part; None if there is none left for this host at this turn.
      own: the window with the part's samples alone.
    """

    window: Window
    turn: int
    part: int | None
    own: Window
    steps: tuple[Step, ...]
    is_last: bool


def part_ranges(lengths: Sequence[int], n_parts: int) -> list[range]:
    """Cuts the samples of a window, of `lengths` tokens, into runs: a sample is where its middle token falls."""
    ends = np.cumsum(lengths, dtype=np.int64)
    middles = 2 * ends - np.asarray(lengths)
    part_of = np.minimum(middles * n_parts // (2 * max(int(ends[-1]), 1)), n_parts - 1)
    bounds = np.searchsorted(part_of, np.arange(n_parts + 1))
    return [range(int(start), int(stop)) for start, stop in itertools.pairwise(bounds)]


def parts_of_window(
    window: Window, shape: BatchShape, *, n_parts: int, host: int = 0, n_hosts: int = 1
) -> Iterator[PartOfWindow]:
    """The turns of one of the hosts. `shape`: of the rows of one host."""
    ranges = part_ranges(window.lengths, n_parts)
    n_turns = -(-n_parts // n_hosts)
    for turn in range(n_turns):
        at_once = [ranges[part] if part < n_parts else range(0) for part in range(turn * n_hosts, (turn + 1) * n_hosts)]
        steps = plan_steps_together([[window.lengths[sample] for sample in samples] for samples in at_once], shape)
        part = turn * n_hosts + host
        samples = at_once[host]
        is_whole = len(samples) == len(window.samples)
        own = window if is_whole else replace(window, samples=window.samples[samples.start : samples.stop])
        yield PartOfWindow(
            window, turn, part if part < n_parts else None, own, tuple(steps[host]), is_last=turn == n_turns - 1
        )
