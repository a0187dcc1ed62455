"""Which tokens of a step are brought to the host, and where each sample's are found among them.

Axis letters: B rows of a step, T tokens of a row, K tokens of a row that are fetched, U what a row of the step gives of
them: one row of the stored arrays each, or a few for each sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64

from core.samples.windows import TokenizedSample
from core.step.layout import StepLayout, sample_spans

# Gathering costs a copy on the device: more than this share of a row is fetched whole.
_WORTH_GATHERING = 3 / 4
_SMALLEST_FETCH = 8

# What picks a sample's stored rows out of what its row of the step gives.
Places = slice | Int64[np.ndarray, "K"]


@dataclass(frozen=True)
class Fetch:
    """What is fetched of one step.

    Attributes:
      gathered: the places in its row of each token that is fetched; None: whole rows.
      samples: by sample of the window (row of the step, its stored rows among what that row gives).
      is_stored: which of what the rows give is stored.
    """

    gathered: Int32[np.ndarray, "B K"] | None
    samples: dict[int, tuple[int, Places]]
    is_stored: Bool[np.ndarray, "B U"]

    @classmethod
    def of(
        cls, gathered: Int32[np.ndarray, "B K"] | None, samples: dict[int, tuple[int, Places]], shape: tuple[int, int]
    ) -> "Fetch":
        """shape: (B, U). Stored is what belongs to a sample."""
        is_stored = np.zeros(shape, bool)
        for row, places in samples.values():
            is_stored[row, places] = True
        return cls(gathered, samples, is_stored)

    def sample_at(self, row: int, unit: int) -> tuple[int, int]:
        """The sample that a stored one of what a row gives belongs to, and its number among the sample's."""
        for sample, (in_row, places) in self.samples.items():
            if in_row == row:
                found = np.flatnonzero(np.arange(self.is_stored.shape[1])[places] == unit)
                if len(found):
                    return sample, int(found[0])
        raise AssertionError("what is stored belongs to a sample")


def fetch_of(layout: StepLayout, samples: Sequence[TokenizedSample], lengths: Sequence[int]) -> Fetch:
    """The stored tokens of a step. They are gathered on the device where that brings over a good deal less.

    `samples` and their `lengths` are the window's; those of other steps are not looked at.
    """
    in_row: dict[int, tuple[int, Places]] = {}
    for row, sample, start, stop in sample_spans(layout, lengths):
        is_whole = samples[sample].reasons is None
        in_row[sample] = row, slice(start, stop) if is_whole else start + samples[sample].kept
    whole = Fetch.of(None, in_row, (layout.n_rows, layout.length))
    if all(samples[sample].reasons is None for sample in in_row):
        return whole
    gathered = places_of(whole.is_stored)
    if gathered is None:
        return whole
    return Fetch.of(gathered, _among_gathered(in_row, samples), gathered.shape)


def places_of(wanted: Bool[np.ndarray, "B T"]) -> Int32[np.ndarray, "B K"] | None:
    """The places of the wanted tokens of each row, in their order; None where too many are wanted to gather them.

    Rows with fewer of them than K repeat token 0, which is not read.
    """
    size = fetch_size(int(wanted.sum(axis=1).max()), wanted.shape[1])
    if size is None:
        return None
    places = np.zeros((len(wanted), size), np.int32)
    for row, of_row in enumerate(wanted):
        found = np.flatnonzero(of_row)
        places[row, : len(found)] = found
    return places


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
