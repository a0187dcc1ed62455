"""The L2 norms of rows: sums, extremes, and a histogram whose bins are the same everywhere.

Axis letters: N rows, H bins.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

BINS_PER_OCTAVE = 4
_LOWEST, _HIGHEST = -16, 24
EDGES = np.exp2(np.arange(_LOWEST * BINS_PER_OCTAVE, _HIGHEST * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE)
"""The edges of the bins, 2^-16 to 2^24 in steps of a quarter octave. Bin i holds EDGES[i - 1] <= norm < EDGES[i]; the
first and the last bin hold what is below (zeros among it) and above."""


@dataclass(frozen=True, eq=False)
class Norms:
    """The norms of `count` rows, in the unit of the activations.

    Attributes:
      total, total_squares: the sum of the norms, and of their squares.
      least, greatest: infinity and 0 without rows.
      histogram: how many norms each bin between `EDGES` holds. Fixed bins make merging exact.
    """

    count: int
    total: float
    total_squares: float
    least: float
    greatest: float
    histogram: Int64[np.ndarray, "H"]

    @classmethod
    def of(cls, norms: Float64[np.ndarray, "N"]) -> "Norms":
        """Of the norms of N rows, N may be 0."""
        bins = np.searchsorted(EDGES, norms, side="right")
        return cls(
            count=len(norms),
            total=float(norms.sum()),
            total_squares=float(norms @ norms),
            least=float(norms.min(initial=math.inf)),
            greatest=float(norms.max(initial=0.0)),
            histogram=np.bincount(bins, minlength=len(EDGES) + 1).astype(np.int64),
        )

    def merged(self, other: "Norms") -> "Norms":
        """Of the rows of both."""
        return Norms(
            self.count + other.count,
            self.total + other.total,
            self.total_squares + other.total_squares,
            min(self.least, other.least),
            max(self.greatest, other.greatest),
            self.histogram + other.histogram,
        )

    @property
    def mean(self) -> float:
        """The mean norm; NaN without rows."""
        return self.total / self.count if self.count else math.nan

    def quantile(self, share: float) -> tuple[float, float]:
        """The edges of the bin that holds the quantile, narrowed by the extremes: they differ by 2^(1/4) at most.

        share: 0 to 1; 0.5 for the median. Exact quantiles would need all norms. Raises ValueError without rows.
        """
        if not self.count:
            raise ValueError("there is no quantile of no rows")
        rank = min(self.count, max(1, math.ceil(share * self.count)))
        place = int(np.searchsorted(np.cumsum(self.histogram), rank))
        low = EDGES[place - 1] if place > 0 else 0.0
        high = EDGES[place] if place < len(EDGES) else math.inf
        return max(float(low), self.least), min(float(high), self.greatest)

    @property
    def median(self) -> float:
        """About the median: the geometric middle of its bin, at most 9% from it. NaN without rows."""
        return math.sqrt(math.prod(self.quantile(0.5))) if self.count else math.nan

    def to_arrays(self) -> dict[str, np.ndarray]:
        """By name, for `from_arrays`; the norms themselves are not kept."""
        sums = np.array([self.total, self.total_squares, self.least, self.greatest])
        return {"norm_sums": sums, "norm_histogram": self.histogram}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Norms":
        """The inverse of `to_arrays`."""
        histogram = arrays["norm_histogram"]
        total, total_squares, least, greatest = arrays["norm_sums"].tolist()
        return cls(int(histogram.sum()), total, total_squares, least, greatest, histogram)
