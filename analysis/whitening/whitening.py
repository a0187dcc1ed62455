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

    def apply(self, x: Float[np.ndarray, "*rows D"], dtype: Any = np.float32) -> Float[np.ndarray, "*rows K"]:
        """Whitened rows, computed in `dtype`, float32 or float64; x may be of any float dtype.

        The mean is subtracted in float64, since it may be hundreds of standard deviations.
        """
        return self._mapped(x, dtype, self.transform, before=self.mean)

    def invert(self, z: Float[np.ndarray, "*rows K"], dtype: Any = np.float32) -> Float[np.ndarray, "*rows D"]:
        """Rows from whitened ones: without the directions that were dropped."""
        return self._mapped(z, dtype, self.inverse, after=self.mean)

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

    def _mapped(
        self,
        rows: Float[np.ndarray, "*rows E"],
        dtype: Any,
        matrix: Float64[np.ndarray, "E F"],
        before: Float64[np.ndarray, "E"] | float = 0.0,
        after: Float64[np.ndarray, "F"] | float = 0.0,
    ) -> Float[np.ndarray, "*rows F"]:
        """(rows - before) @ matrix + after, block by block."""
        matrix, flat = matrix.astype(dtype), rows.reshape(-1, rows.shape[-1])
        mapped = np.empty((len(flat), matrix.shape[1]), dtype)
        for block in _blocks(len(flat)):
            mapped[block] = (flat[block].astype(np.float64) - before).astype(dtype) @ matrix + after
        return mapped.reshape(*rows.shape[:-1], matrix.shape[1])


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK_ROWS) for start in range(0, count, _BLOCK_ROWS))
