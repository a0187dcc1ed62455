"""The smallest and largest value of each dimension, and which dimensions stand out.

Axis letters: N rows, D width of a row.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

OUTLIER_FACTOR = 20.0
"""How many times the median makes a dimension an outlier. See `outlier_dimensions`."""


@dataclass(frozen=True, eq=False)
class Extremes:
    """The smallest and largest value of each dimension: infinity and -infinity without rows."""

    low: Float64[np.ndarray, "D"]
    high: Float64[np.ndarray, "D"]

    @classmethod
    def of(cls, rows: Float64[np.ndarray, "N D"]) -> "Extremes":
        """Of N rows, N may be 0."""
        return cls(rows.min(axis=0, initial=np.inf), rows.max(axis=0, initial=-np.inf))

    def merged(self, other: "Extremes") -> "Extremes":
        """Of the rows of both."""
        return Extremes(np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    @property
    def peaks(self) -> Float64[np.ndarray, "D"]:
        """The largest magnitude of each dimension; 0 without rows."""
        peaks = np.maximum(np.abs(self.low), np.abs(self.high))
        return np.where(self.low <= self.high, peaks, 0.0)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """By name, for `from_arrays`."""
        return {"min": self.low, "max": self.high}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Extremes":
        """The inverse of `to_arrays`."""
        return cls(arrays["min"], arrays["max"])


@dataclass(frozen=True)
class OutlierDimension:
    """A dimension that stands out.

    Attributes:
      peak: its largest magnitude, and peak_ratio: that over the median of all dimensions.
      variance, variance_ratio: the same of its variance.
    """

    dimension: int
    peak: float
    peak_ratio: float
    variance: float
    variance_ratio: float

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def outlier_dimensions(
    peaks: Float64[np.ndarray, "D"], variances: Float64[np.ndarray, "D"], factor: float = OUTLIER_FACTOR
) -> tuple[OutlierDimension, ...]:
    """The dimensions whose largest magnitude, or whose variance, exceeds `factor` times the median dimension's.

    The largest ratio comes first. Multiples of a median as in Sun et al., Massive Activations in Large Language Models
    (arXiv 2402.17762), who compare single values with the median magnitude of their hidden state (1,000 times), and
    dimensions as in Dettmers et al., LLM.int8() (arXiv 2208.07339), who compare magnitudes with a constant (6).
    """
    peak_ratios, variance_ratios = _over_median(peaks), _over_median(variances)
    ratios = np.maximum(peak_ratios, variance_ratios)
    found = np.flatnonzero(ratios > factor)
    columns = (peaks, peak_ratios, variances, variance_ratios)
    return tuple(
        OutlierDimension(int(place), *(float(column[place]) for column in columns))
        for place in found[np.argsort(-ratios[found], kind="stable")]
    )


def _over_median(values: Float64[np.ndarray, "D"]) -> Float64[np.ndarray, "D"]:
    """Infinity for a value above a median of 0."""
    middle = np.median(values)
    return np.where(values > 0, values / middle if middle > 0 else np.inf, 0.0)
