"""Finds stored values of a step that do not fit their dtype, from the peaks that are copied with them.

Axis letters: L stored layers of a site, B rows of the step, U output rows per row of the step.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Float32

from core.step.fetching import Fetch

Peaks = Mapping[str, Float32[np.ndarray, "L B U"]]


@dataclass(frozen=True)
class UnfitRow:
    """A stored output row with a value that its dtype cannot hold.

    Attributes:
      slot, row, unit: its place in the arrays of the site.
      peak: its largest magnitude; infinity where the model computed NaN or infinity.
    """

    site: str
    slot: int
    row: int
    unit: int
    peak: float

    @property
    def is_finite(self) -> bool:
        """Whether the model computed a number, which is only too large."""
        return math.isfinite(self.peak)


def largest_of(dtype: np.dtype) -> float:
    """The largest finite value of a float dtype."""
    return float(ml_dtypes.finfo(dtype).max)


def first_unfit_row(peaks: Peaks, fetch: Fetch, limit: float) -> UnfitRow | None:
    """The first stored row whose peak is NaN, infinite or above `limit`; None: there is none."""
    for site, of_site in peaks.items():
        for slot, row, unit in np.argwhere(~(of_site <= limit) & fetch.is_stored):
            return UnfitRow(site, int(slot), int(row), int(unit), float(of_site[slot, row, unit]))
    return None
