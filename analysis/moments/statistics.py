"""What users read of moments: covariance, standard deviations, correlation, norms, and what stands out.

Axis letters: D width of a row.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from analysis.moments.extremes import OUTLIER_FACTOR, Extremes, OutlierDimension, outlier_dimensions
from analysis.moments.largest import LargestTokens
from analysis.moments.norms import Norms

_DIGITS = 6


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of `count` rows, in float64. The covariance is divided by count - ddof."""

    count: int
    ddof: int
    mean: Float64[np.ndarray, "D"]
    covariance: Float64[np.ndarray, "D D"]
    norms: Norms
    extremes: Extremes
    largest: LargestTokens

    @property
    def variance(self) -> Float64[np.ndarray, "D"]:
        """The diagonal of the covariance."""
        return np.diag(self.covariance).copy()

    @property
    def std(self) -> Float64[np.ndarray, "D"]:
        """The standard deviation of each dimension."""
        return np.sqrt(self.variance)

    @property
    def correlation(self) -> Float64[np.ndarray, "D D"]:
        """Covariance over both standard deviations; 0 for a dimension that does not vary, also with itself."""
        std = self.std
        scale = np.where(std > 0, 1 / np.where(std > 0, std, 1), 0)
        return self.covariance * scale[:, None] * scale

    @property
    def mean_norm(self) -> float:
        """The norm of the mean. The mean of the norms is `norms.mean`."""
        return float(np.linalg.norm(self.mean))

    def outliers(self, factor: float = OUTLIER_FACTOR) -> tuple[OutlierDimension, ...]:
        """The dimensions that `analysis.moments.extremes.outlier_dimensions` finds."""
        return outlier_dimensions(self.extremes.peaks, self.variance, factor)

    def to_arrays(self, prefix: str = "") -> dict[str, np.ndarray]:
        """What other tools read, by names such as `residual/14/covariance` (prefix `residual/14/`).

        Merging goes on from `Moments.to_arrays`: a covariance times its divisor is not the scatter's bits.
        """
        arrays = {
            "count": np.array([self.count]),
            "mean": self.mean,
            "covariance": self.covariance,
            "std": self.std,
            **self.extremes.to_arrays(),
        }
        return {prefix + name: array for name, array in arrays.items()}

    def summary(self) -> dict[str, Any]:
        """JSON for people and reports, rounded to six digits: no array of the width of a row."""
        low, high = self.norms.quantile(0.5)
        figures = {
            "mean": self.norms.mean,
            "rms": float(np.sqrt(self.norms.total_squares / self.count)),
            "min": self.norms.least,
            "max": self.norms.greatest,
            "median_between": [low, high],
        }
        found = {
            "count": self.count,
            "width": len(self.mean),
            "ddof": self.ddof,
            "norm": figures,
            "norm_of_mean": self.mean_norm,
            "total_variance": float(self.variance.sum()),
            "outlier_dimensions": [outlier.to_json() for outlier in self.outliers()],
            "largest_tokens": self.largest.to_json(),
        }
        return _rounded(found)


def _rounded(value: Any) -> Any:
    """The last bits of floats differ between kinds of hardware. JSON has no infinity: null."""
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
    return value
