"""Which tokens of a step are brought to the host, and where each sample's are found among them.

Axis letters: B rows of a step, T tokens of a row, K tokens of a row that are fetched.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32

from core.batching import Step, sample_spans
from core.windows import TokenizedSample

# Gathering costs a copy on the device: more than this share of a row is fetched whole.
_WORTH_GATHERING = 3 / 4
_SMALLEST_FETCH = 8

# What picks a sample's stored tokens out of its fetched row.
Places = slice | Int32[np.ndarray, "K"]


@dataclass(frozen=True)
class Fetch:
    """What is fetched of one step.

    Attributes:
      gathered: the places in its row of each token that is fetched; None: whole rows.
      samples: by sample of the window (row of the step, its stored tokens among what is fetched of the row).
      stored: the tokens that are stored.
    """

    gathered: Int32[np.ndarray, "B K"] | None
    samples: dict[int, tuple[int, Places]]
    stored: Bool[np.ndarray, "B T"]


def plan_fetch(step: Step, samples: Sequence[TokenizedSample], lengths: Sequence[int]) -> Fetch:
    """Gathers on the device where that brings over a good deal less. `samples` and their `lengths` are the window's."""
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
