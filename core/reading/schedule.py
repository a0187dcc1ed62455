"""In which order rows are read: a function of the parts, the settings and (seed, epoch), computed without reading.

An epoch is a sequence of groups of parts, a group a sequence of fills, a fill a set of chunks: runs of neighbouring
rows. A fill is what is in memory at once. In order, a fill is one chunk. Shuffled, the parts of an epoch are permuted
and dealt to groups; the chunks of a group are permuted and dealt to fills; the rows of a fill are permuted. So a place
in the order is four numbers, and any fill can be made again from them alone.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

_PARTS, _CHUNKS, _ROWS = range(3)


@dataclass(frozen=True)
class Chunk:
    """Rows start to stop - 1 of a part, by its index among all parts."""

    part: int
    start: int
    stop: int


@dataclass(frozen=True)
class Place:
    """A place in the order: the next row is number `row` of a fill, after rows were dropped from it."""

    epoch: int = 0
    group: int = 0
    fill: int = 0
    row: int = 0


@dataclass(frozen=True)
class Schedule:
    """The order of the rows of some parts.

    Attributes:
      n_rows: of each part.
      chunk_rows: the most rows of a chunk.
      fill_rows: the most rows of a fill that is not a single chunk.
      seed: of the shuffle; None: in order.
      group_parts: the least parts in a group, from which fills are mixed; 0: as many as make one fill.
      share: (i, n): part number i of every n, of the epoch's order, is read.
    """

    n_rows: tuple[int, ...]
    chunk_rows: int
    fill_rows: int
    seed: int | None = None
    group_parts: int = 1
    share: tuple[int, int] = (0, 1)

    def groups(self, epoch: int) -> list[tuple[int, ...]]:
        """The parts of each group."""
        return _groups(self, epoch)

    def fills(self, epoch: int, group: int) -> list[tuple[Chunk, ...]]:
        """The chunks of each fill of a group, in the order of the parts and rows."""
        return _fills(self, epoch, group)

    def order(self, place: Place, n_rows: int) -> Int64[np.ndarray, "n"] | None:
        """The order of the `n_rows` rows that are left in the fill of `place`; None: as they are."""
        if self.seed is None:
            return None
        return self.permutation(n_rows, place.epoch, _ROWS, place.group, place.fill)

    def permutation(self, n: int, *key: int) -> Int64[np.ndarray, "n"]:
        """A permutation that depends on the seed, the key and n alone."""
        # Raw PCG64 words are the only random stream that numpy guarantees across versions.
        words = np.random.PCG64(np.random.SeedSequence([self.seed or 0, *key])).random_raw(n)
        return np.argsort(words, kind="stable")

    def parts(self, epoch: int) -> Sequence[int]:
        """The parts of this share, in the order of the epoch."""
        n = len(self.n_rows)
        order = range(n) if self.seed is None else self.permutation(n, epoch, _PARTS).tolist()
        return order[self.share[0] :: self.share[1]]


@functools.lru_cache(maxsize=8)
def _groups(schedule: Schedule, epoch: int) -> list[tuple[int, ...]]:
    parts = schedule.parts(epoch)
    if schedule.seed is None or not parts:
        return [(part,) for part in parts]
    sizes = [schedule.n_rows[part] for part in parts]
    if schedule.group_parts:
        mean_rows = max(1, sum(sizes) / len(sizes))
        per_group = max(schedule.group_parts, math.ceil(schedule.fill_rows / mean_rows))
    else:
        per_group = max(1, schedule.fill_rows // max(*sizes, 1))
    # Groups of about the same size, so that the last one is mixed as well as the others.
    n_groups = math.ceil(len(parts) / per_group)
    bounds = np.linspace(0, len(parts), n_groups + 1).astype(int).tolist()
    return [tuple(parts[start:stop]) for start, stop in itertools.pairwise(bounds)]


@functools.lru_cache(maxsize=8)
def _fills(schedule: Schedule, epoch: int, group: int) -> list[tuple[Chunk, ...]]:
    size = schedule.chunk_rows
    chunks = [
        Chunk(part, start, min(start + size, schedule.n_rows[part]))
        for part in schedule.groups(epoch)[group]
        for start in range(0, schedule.n_rows[part], size)
    ]
    if schedule.seed is None or not chunks:
        return [(chunk,) for chunk in chunks]
    order = schedule.permutation(len(chunks), epoch, _CHUNKS, group).tolist()
    rows = np.array([chunks[chunk].stop - chunks[chunk].start for chunk in order])
    # A chunk belongs to the fill in which it begins, so a fill may be longer than its share by a chunk.
    n_fills = math.ceil(rows.sum() / max(1, schedule.fill_rows - int(rows.max())))
    n_fills = min(n_fills, len(chunks))
    fill_of = (np.cumsum(rows) - rows) * n_fills // rows.sum()
    fills: list[list[Chunk]] = [[] for _ in range(n_fills)]
    for chunk, fill in zip(order, fill_of.tolist(), strict=True):
        fills[fill].append(chunks[chunk])
    return [tuple(sorted(fill, key=lambda chunk: (chunk.part, chunk.start))) for fill in fills]
