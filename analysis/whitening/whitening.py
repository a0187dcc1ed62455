"""A whitening: computed from moments, applied to rows, inverted, checked.

Axis letters: D width of a row, K width of a whitened row.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from analysis.moments import Moments
from analysis.whitening.settings import WhiteningSettings
from analysis.whitening.shrinkage import estimated_covariance
from analysis.whitening.transforms import transforms_of

_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class WhiteningCheck:
    """How far the covariance of whitened rows is from the identity.

    Attributes:
      max_error: the largest entry of |W S W^T - I|. About 1 where directions were dropped and the method rotates back.
      kept_error: the largest distance from 1 of the `rank` largest eigenvalues of W S W^T: without what is below the
        floor. Of other rows than the whitening was made from, it is how far their covariance is another one.
      rank: directions above the floor that are kept, of `width`; `rank_limit`: the most that the rows allow.
    """

    max_error: float
    kept_error: float
    rank: int
    width: int
    rank_limit: int

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Whitening:
    """z = (x - mean) @ transform and x = z @ inverse + mean, in float64.

    Attributes:
      n_samples: the rows (tokens) that it was made from.
      rank: directions above the floor; fewer than D, and some of D were dropped or floored: `settings.below`.
      shrinkage_amount: rho, 0 without shrinkage.
    """

    mean: Float64[np.ndarray, "D"]
    transform: Float64[np.ndarray, "D K"]
    inverse: Float64[np.ndarray, "K D"]
    n_samples: int
    settings: WhiteningSettings
    rank: int
    shrinkage_amount: float

    @classmethod
    def fit(cls, moments: Moments, settings: WhiteningSettings | None = None) -> "Whitening":
        """Of the rows of the moments.

        Raises RunError if they do not vary, UsageError if there are fewer dimensions than components to keep, or for
        cholesky where directions would be dropped.
        """
        settings = WhiteningSettings() if settings is None else settings
        settings.check_width(moments.width)
        covariance, amount = estimated_covariance(moments, settings.shrinkage)
        transform, inverse, rank = transforms_of(covariance, settings)
        return cls(moments.mean, transform, inverse, moments.count, settings, rank, amount)

    @property
    def width(self) -> int:
        """D."""
        return len(self.mean)

    @property
    def kept(self) -> int:
        """K, the width of a whitened row."""
        return self.transform.shape[1]

    def apply(
        self, x: Float[np.ndarray, "*rows D"], dtype: Any = np.float32, compute_dtype: Any = np.float64
    ) -> Float[np.ndarray, "*rows K"]:
        """Whitened rows in `dtype`; x may be of any float dtype.

        compute_dtype: of the matrix product. With float32 it takes half the time, and the covariance of z is off by
        1e-5 if attention sinks are among the rows (they are thousands of times as long as the others, and most of that
        cancels), by 5e-7 if not. The mean is subtracted in float64 in any case.
        """
        matrix = self.transform.astype(compute_dtype)
        z = np.empty((*x.shape[:-1], self.kept), dtype)
        for rows, whitened in _blocks(x, z):
            whitened[:] = (rows.astype(np.float64) - self.mean).astype(compute_dtype) @ matrix
        return z

    def invert(self, z: Float[np.ndarray, "*rows K"], dtype: Any = np.float32) -> Float[np.ndarray, "*rows D"]:
        """Rows in `dtype` from whitened ones, computed in float64: without the directions that were dropped."""
        x = np.empty((*z.shape[:-1], self.width), dtype)
        for whitened, rows in _blocks(z, x):
            rows[:] = whitened.astype(np.float64) @ self.inverse + self.mean
        return x

    def check(self, moments: Moments) -> WhiteningCheck:
        """Of the rows of these moments, or of others. Computed in float64."""
        found = self.transform.T @ moments.finish().covariance @ self.transform
        rank = min(self.rank, self.kept)
        largest = np.linalg.eigvalsh(found)[::-1][:rank]
        return WhiteningCheck(
            max_error=float(np.abs(found - np.eye(self.kept)).max()),
            kept_error=float(np.abs(largest - 1).max()),
            rank=rank,
            width=self.kept,
            rank_limit=min(moments.count - 1, self.width),
        )


def _blocks(
    taken: Float[np.ndarray, "*rows E"], given: Float[np.ndarray, "*rows F"]
) -> Iterator[tuple[Float[np.ndarray, "N E"], Float[np.ndarray, "N F"]]]:
    """The same rows of both, few enough to be held in float64."""
    taken, given = taken.reshape(-1, taken.shape[-1]), given.reshape(-1, given.shape[-1])
    for start in range(0, len(taken), _BLOCK_ROWS):
        yield taken[start : start + _BLOCK_ROWS], given[start : start + _BLOCK_ROWS]
