"""Mean and spread of many vectors, accumulated batch by batch in float64.

Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979). Unlike a
sum and a sum of squares, it loses nothing where the mean is large beside the spread.
Axis letters: S samples, W width of a vector.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64


@dataclass(frozen=True)
class VectorMoments:
    """Of some vectors: their number, their mean, and the sum of the squared distances from it, by dimension."""

    count: int
    mean: Float64[np.ndarray, "W"]
    squares: Float64[np.ndarray, "W"]

    @classmethod
    def of(cls, vectors: Float32[np.ndarray, "S W"]) -> "VectorMoments":
        """The moments of the vectors of one batch, which may be none."""
        wide = vectors.astype(np.float64)
        if not len(wide):
            return cls(0, np.zeros(wide.shape[1]), np.zeros(wide.shape[1]))
        mean = wide.mean(axis=0)
        return cls(len(wide), mean, np.square(wide - mean).sum(axis=0))

    def merged(self, other: "VectorMoments") -> "VectorMoments":
        """The moments of these vectors and of those of `other`, in this order."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        squares = self.squares + other.squares + np.square(step) * (self.count * other.count / count)
        return VectorMoments(count, mean, squares)

    def standard_error(self) -> Float64[np.ndarray, "W"]:
        """Of the mean, by dimension: sqrt(squares / (count - 1) / count); NaN for one vector, which says nothing."""
        if self.count < 2:
            return np.full_like(self.mean, np.nan)
        return np.sqrt(self.squares / (self.count - 1) / self.count)
