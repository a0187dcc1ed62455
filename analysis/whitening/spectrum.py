"""Eigenvalues and eigenvectors, the same on every call, with a floor.

Axis letters: D width of a row, K kept directions.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from analysis.whitening.settings import WhiteningSettings


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The kept directions of a symmetric matrix, largest eigenvalue first.

    Attributes:
      values: none below the floor. vectors: orthonormal columns; of each the entry of largest magnitude is positive.
      rank: how many eigenvalues of the matrix are above the floor.
    """

    values: Float64[np.ndarray, "K"]
    vectors: Float64[np.ndarray, "D K"]
    rank: int

    @classmethod
    def of(cls, matrix: Float64[np.ndarray, "D D"], settings: WhiteningSettings) -> "Spectrum":
        """Of a covariance or correlation, as `settings` say."""
        ascending, columns = np.linalg.eigh(matrix)
        values, vectors = ascending[::-1], columns[:, ::-1]
        floor = settings.floor * values[0]
        rank = int(np.sum(values > floor))
        kept = rank if settings.below == "drop" else len(values)
        kept = min(kept, settings.n_components or kept)
        return cls(np.maximum(values[:kept], floor), _with_signs(vectors[:, :kept]), rank)


def _with_signs(vectors: Float64[np.ndarray, "D K"]) -> Float64[np.ndarray, "D K"]:
    """An eigenvector and its negative are both right, and which one LAPACK gives differs between machines."""
    largest = np.argmax(np.abs(vectors), axis=0)
    return vectors * np.where(np.take_along_axis(vectors, largest[None], axis=0) < 0, -1.0, 1.0)
