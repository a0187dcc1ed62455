"""The tokens of a step that are copied to the host, and where each sample's are among them.

Axis letters: B rows of a step, T tokens of a row, K fetched tokens of a row, U output rows per row of the step: one for
each fetched token, or P, one for each pool, for each sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from core.samples.windows import TokenizedSample
from core.step.layout import StepLayout, sample_spans

# Gathering costs a copy on the device: if more than this share of a row is stored, all of it is fetched.
_WORTH_GATHERING = 3 / 4
_SMALLEST_FETCH = 8

# Index of a sample's stored rows in its row of the output.
Places = slice | Int64[np.ndarray, "K"]


@dataclass(frozen=True)
class Fetch:
    """The part of one step's output that is fetched.

    Attributes:
      gathered: the places of the fetched tokens in their row; None: whole rows.
      samples: by sample of the window (row of the step, index of its stored rows in that row of the output).
      is_stored: mask of the stored output rows.
      weights: of each fetched token in each pool of its sample, 0 outside it; None where tokens are stored.
      slots: the place of its sample among those of the row, for each fetched token; a number that no sample has for
        padding.
    """

    gathered: Int32[np.ndarray, "B K"] | None
    samples: dict[int, tuple[int, Places]]
    is_stored: Bool[np.ndarray, "B U"]
    weights: Float32[np.ndarray, "P B K"] | None = None
    slots: Int32[np.ndarray, "B K"] | None = None

    @classmethod
    def of(
        cls, gathered: Int32[np.ndarray, "B K"] | None, samples: dict[int, tuple[int, Places]], shape: tuple[int, int]
    ) -> "Fetch":
        """shape: (B, U). The rows that belong to a sample are stored."""
        is_stored = np.zeros(shape, bool)
        for row, places in samples.values():
            is_stored[row, places] = True
        return cls(gathered, samples, is_stored)

    def sample_at(self, row: int, unit: int) -> tuple[int, int]:
        """The sample that the stored output row at (row, unit) belongs to, and that row's number within the sample."""
        for sample, (in_row, places) in self.samples.items():
            if in_row == row:
                found = np.flatnonzero(np.arange(self.is_stored.shape[1])[places] == unit)
                if len(found):
                    return sample, int(found[0])
        raise AssertionError(f"({row}, {unit}) is not stored")


def fetch_of(layout: StepLayout, samples: Sequence[TokenizedSample], lengths: Sequence[int]) -> Fetch:
    """The stored tokens of a step. They are gathered on the device if that saves more than a quarter of the copy.

    `samples` and their `lengths` are the window's; those of other steps are ignored.
    """
    in_row: dict[int, tuple[int, Places]] = {}
    for row, sample, start, stop in sample_spans(layout, lengths):
        is_whole = samples[sample].reasons is None
        in_row[sample] = row, slice(start, stop) if is_whole else start + samples[sample].stored_places
    whole = Fetch.of(None, in_row, (layout.n_rows, layout.length))
    if all(samples[sample].reasons is None for sample in in_row):
        return whole
    gathered = places_of(whole.is_stored)
    if gathered is None:
        return whole
    return Fetch.of(gathered, _among_gathered(in_row, samples), gathered.shape)


def places_of(wanted: Bool[np.ndarray, "B T"]) -> Int32[np.ndarray, "B K"] | None:
    """The places of the wanted tokens of each row, in order; None: too many are wanted to be worth gathering.

    Rows with fewer than K of them are filled up with token 0, which is not read.
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
    """The number of tokens to gather from each row of `length` so that `most_stored` fit; None: all of them.

    Few sizes, because each is compiled: three quarters of the row, a half, a quarter and so on.
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
    """The index of each sample among the gathered tokens. `in_row` is in the order of the samples in their rows."""
    taken: dict[int, int] = {}
    found: dict[int, tuple[int, Places]] = {}
    for sample, (row, _) in in_row.items():
        start = taken.get(row, 0)
        taken[row] = start + len(samples[sample].stored_places)
        found[sample] = row, slice(start, taken[row])
    return found
