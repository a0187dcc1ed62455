"""Which tokens of a step are brought to the host, and where each sample's are found among them.

Axis letters: B rows of a step, T tokens of a row, K tokens of a row that are fetched, P pools, U rows of the stored
arrays that a row of the step makes: one a fetched token, or P for each of its samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int32

from core.reduce.reductions import Pool
from core.samples.windows import TokenizedSample
from core.step.layout import StepLayout, sample_spans

# Gathering costs a copy on the device: more than this share of a row is fetched whole.
_WORTH_GATHERING = 3 / 4
_SMALLEST_FETCH = 8

# What picks a sample's stored tokens out of its fetched row.
Places = slice | Int32[np.ndarray, "K"]


@dataclass(frozen=True)
class Pooling:
    """Which fetched tokens make which sample's pools.

    Attributes:
      weights: of each token in each pool of its sample.
      slots: which sample of its row a token belongs to, counted in the row; `n_slots` for tokens of none.
      n_slots: as many samples of a row as there is room for.
    """

    weights: Float32[np.ndarray, "P B K"]
    slots: Int32[np.ndarray, "B K"]
    n_slots: int


@dataclass(frozen=True)
class Fetch:
    """What is fetched of one step.

    Attributes:
      gathered: the places in its row of each token that is fetched; None: whole rows.
      samples: by sample of the window (row of the step, its stored rows among what that row makes).
      stored: the tokens that are stored, or pooled.
      pooling: how tokens become rows; None: each token is one.
    """

    gathered: Int32[np.ndarray, "B K"] | None
    samples: dict[int, tuple[int, Places]]
    stored: Bool[np.ndarray, "B T"]
    pooling: Pooling | None = None

    @property
    def n_units(self) -> int:
        """U."""
        if self.pooling is not None:
            return len(self.pooling.weights) * self.pooling.n_slots
        return (self.stored if self.gathered is None else self.gathered).shape[1]

    def units(self) -> Bool[np.ndarray, "B U"]:
        """Which rows of what is fetched are stored."""
        stored = np.zeros((len(self.stored), self.n_units), bool)
        for row, places in self.samples.values():
            stored[row, places] = True
        return stored

    def unit_at(self, row: int, unit: int) -> tuple[int, int]:
        """The sample that a stored row of what is fetched belongs to, and its number among the sample's."""
        for sample, (in_row, places) in self.samples.items():
            if in_row == row:
                found = np.flatnonzero(np.arange(self.n_units)[places] == unit)
                if len(found):
                    return sample, int(found[0])
        raise AssertionError("a stored row belongs to a sample")


def plan_fetch(
    step: StepLayout, samples: Sequence[TokenizedSample], lengths: Sequence[int], pools: Sequence[Pool] = ()
) -> Fetch:
    """Gathers on the device where that brings over a good deal less. `samples` and their `lengths` are the window's."""
    return _plan_pooled(step, samples, lengths, pools) if pools else _plan_tokens(step, samples, lengths)


def _plan_tokens(step: StepLayout, samples: Sequence[TokenizedSample], lengths: Sequence[int]) -> Fetch:
    stored = np.zeros((step.n_rows, step.length), bool)
    in_row: dict[int, tuple[int, Places]] = {}
    for row, sample, start, stop in sample_spans(step, lengths):
        reasons = samples[sample].reasons
        stored[row, start:stop] = True if reasons is None else reasons == 0
        in_row[sample] = row, slice(start, stop) if reasons is None else start + samples[sample].kept
    size = None
    if any(samples[sample].reasons is not None for sample in in_row):
        size = fetch_size(int(stored.sum(axis=1).max()), step.length)
    if size is None:
        return Fetch(None, in_row, stored)
    return Fetch(_gathered(stored, size), _among_gathered(in_row, samples), stored)


def _plan_pooled(
    step: StepLayout, samples: Sequence[TokenizedSample], lengths: Sequence[int], pools: Sequence[Pool]
) -> Fetch:
    """Fetches the tokens that weigh something: all of them for a mean, one a sample for the last."""
    weights = np.zeros((len(pools), step.n_rows, step.length), np.float32)
    slots = np.full((step.n_rows, step.length), -1, np.int32)
    in_row: dict[int, tuple[int, Places]] = {}
    taken = np.zeros(step.n_rows, np.int32)
    for row, sample, start, _ in sample_spans(step, lengths):
        places, slot = start + samples[sample].kept, int(taken[row])
        in_row[sample] = row, slice(slot * len(pools), (slot + bool(len(places))) * len(pools))
        if len(places):
            weights[:, row, places] = [pool.weights(len(places)) for pool in pools]
            slots[row, places] = slot
            taken[row] += 1
    n_slots = 1 << (max(1, int(taken.max())) - 1).bit_length()  # few numbers, for each is compiled
    slots[slots < 0] = n_slots
    wanted = np.any(weights > 0, axis=0)
    size = fetch_size(int(wanted.sum(axis=1).max()), step.length)
    if size is None:
        return Fetch(None, in_row, slots < n_slots, Pooling(weights, slots, n_slots))
    gathered = _gathered(wanted, size)
    is_repeat = np.arange(size) >= wanted.sum(axis=1, keepdims=True)
    pooling = Pooling(
        np.take_along_axis(weights, gathered[None], axis=2),
        np.where(is_repeat, np.int32(n_slots), np.take_along_axis(slots, gathered, axis=1)),
        n_slots,
    )
    return Fetch(gathered, in_row, slots < n_slots, pooling)


def fetch_size(most_stored: int, length: int) -> int | None:
    """How many tokens of each row of `length` to fetch so that `most_stored` are among them; None: all.

    Few sizes, for each is compiled: three quarters of the row, and its halves.
    """
    size = int(length * _WORTH_GATHERING)
    if most_stored > size:
        return None
    half = length // 2
    while half >= max(most_stored, _SMALLEST_FETCH):
        size, half = half, half // 2
    return size


def _gathered(stored: Bool[np.ndarray, "B T"], size: int) -> Int32[np.ndarray, "B K"]:
    """Rows with fewer stored tokens than K repeat token 0, which nobody reads."""
    places = np.zeros((len(stored), size), np.int32)
    for row, kept in enumerate(stored):
        found = np.flatnonzero(kept)
        places[row, : len(found)] = found
    return places


def _among_gathered(
    in_row: dict[int, tuple[int, Places]], samples: Sequence[TokenizedSample]
) -> dict[int, tuple[int, Places]]:
    """`in_row` lists the samples of a row in their order there."""
    taken: dict[int, int] = {}
    found: dict[int, tuple[int, Places]] = {}
    for sample, (row, _) in in_row.items():
        start = taken.get(row, 0)
        taken[row] = start + len(samples[sample].kept)
        found[sample] = row, slice(start, taken[row])
    return found
