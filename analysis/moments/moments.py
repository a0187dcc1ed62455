"""The moments of rows: computed for a block, merged without loss.

Axis letters: N rows, D width of a row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from analysis.moments.extremes import Extremes
from analysis.moments.largest import LargestTokens, TokenOrigins
from analysis.moments.norms import Norms
from analysis.moments.statistics import Statistics
from core.base.errors import RunError

LARGEST_TOKENS = 16
_BLOCK_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of `count` rows x, in float64. c = x - mean below; units are powers of the activations'.

    Attributes:
      scatter: the sum of c c^T.
      cubes, fourth: the sums of |c|^2 c and of |c|^4. The second is what Ledoit-Wolf shrinkage needs; the first is what
        moves it to another mean.
      norms, extremes, largest: of x, not of c.
    """

    count: int
    mean: Float64[np.ndarray, "D"]
    scatter: Float64[np.ndarray, "D D"]
    cubes: Float64[np.ndarray, "D"]
    fourth: float
    norms: Norms
    extremes: Extremes
    largest: LargestTokens

    @classmethod
    def empty(cls, width: int, largest: int = LARGEST_TOKENS) -> "Moments":
        """Of no rows: merged with others it changes nothing."""
        return cls.of(np.zeros((0, width)), largest=largest)

    @classmethod
    def of(
        cls,
        x: Float[np.ndarray, "N D"],
        origins: TokenOrigins | None = None,
        largest: int = LARGEST_TOKENS,
    ) -> "Moments":
        """Of rows of any float dtype, in two passes: the mean, then what is centred on it.

        Blocks of rows are upcast one at a time, so that memory grows with D * D and not with N.

        Args:
          origins: where the rows come from; without them row i is sample i.
          largest: how many of the tokens with the largest norms to keep.

        Raises RunError for a row that holds NaN or infinity, or values whose fourth powers overflow float64.
        """
        origins = TokenOrigins.of_rows(len(x)) if origins is None else origins
        if len(origins) != len(x):
            raise ValueError(f"{len(origins)} origins of {len(x)} rows")
        mean, norms, extremes = _first_pass(x, origins)
        scatter, cubes, fourth = _second_pass(x, mean)
        if not np.isfinite(fourth):
            raise RunError(f"values of magnitude {extremes.peaks.max():.1e}: their fourth powers overflow float64")
        tokens = LargestTokens.of(norms, origins, largest)
        return cls(len(x), mean, scatter, cubes, fourth, Norms.of(norms), extremes, tokens)

    @property
    def width(self) -> int:
        """D."""
        return len(self.mean)

    def finish(self, ddof: int = 1) -> Statistics:
        """The covariance is scatter / (count - ddof): unbiased with 1, the maximum likelihood with 0.

        Raises ValueError with fewer than ddof + 1 rows.
        """
        if self.count <= ddof:
            raise ValueError(f"a covariance needs more than {ddof} rows: there are {self.count}")
        covariance = self.scatter / (self.count - ddof)
        return Statistics(self.count, ddof, self.mean, covariance, self.norms, self.extremes, self.largest)

    def to_arrays(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Every bit of it, by names such as `residual/14/scatter` (prefix `residual/14/`)."""
        scalars = {"count": np.array([self.count]), "fourth": np.array([self.fourth])}
        own = scalars | {"mean": self.mean, "scatter": self.scatter, "cubes": self.cubes}
        arrays = own | self.norms.to_arrays() | self.extremes.to_arrays() | self.largest.to_arrays()
        return {prefix + name: array for name, array in arrays.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str = "") -> "Moments":
        """The inverse of `to_arrays`, bit for bit. Raises KeyError for an array that is missing."""
        own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        return cls(
            int(own["count"][0]),
            own["mean"],
            own["scatter"],
            own["cubes"],
            float(own["fourth"][0]),
            Norms.from_arrays(own),
            Extremes.from_arrays(own),
            LargestTokens.from_arrays(own),
        )


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the rows of both; neither is changed. Raises ValueError if their widths differ.

    Source: Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (1979),
    equations 2.1; the third and fourth powers follow from writing c as the old c plus the way the mean moved.
    """
    if a.width != b.width:
        raise ValueError(f"rows of {a.width} and of {b.width} values cannot be merged")
    count = a.count + b.count
    norms, extremes, largest = a.norms.merged(b.norms), a.extremes.merged(b.extremes), a.largest.merged(b.largest)
    if not (a.count and b.count):
        some = a if a.count else b
        return Moments(count, some.mean, some.scatter, some.cubes, some.fourth, norms, extremes, largest)
    apart = b.mean - a.mean
    mean = a.mean + apart * (b.count / count)
    scatter = np.outer(apart, apart)
    scatter *= a.count * b.count / count
    scatter += a.scatter
    scatter += b.scatter
    moved = _moved(a, apart * (-b.count / count)), _moved(b, apart * (a.count / count))
    (cubes_a, fourth_a), (cubes_b, fourth_b) = moved
    return Moments(count, mean, scatter, cubes_a + cubes_b, fourth_a + fourth_b, norms, extremes, largest)


def _moved(moments: Moments, by: Float64[np.ndarray, "D"]) -> tuple[Float64[np.ndarray, "D"], float]:
    """`cubes` and `fourth` with `by` added to every c."""
    count, trace, along = moments.count, float(np.trace(moments.scatter)), moments.scatter @ by
    length = float(by @ by)
    cubes = moments.cubes + 2 * along + (trace + count * length) * by
    fourth = moments.fourth + 4 * float(moments.cubes @ by) + 4 * float(by @ along)
    return cubes, fourth + 2 * length * trace + count * length * length


def _blocks(x: Float[np.ndarray, "N D"]) -> Iterator[Float64[np.ndarray, "_ D"]]:
    return (x[start : start + _BLOCK_ROWS].astype(np.float64) for start in range(0, len(x), _BLOCK_ROWS))


def _first_pass(
    x: Float[np.ndarray, "N D"], origins: TokenOrigins
) -> tuple[Float64[np.ndarray, "D"], Float64[np.ndarray, "N"], Extremes]:
    """The mean, the norm of each row, and the extremes."""
    total, norms = np.zeros(x.shape[1]), np.zeros(len(x))
    extremes = Extremes.of(np.zeros((0, x.shape[1])))
    for number, block in enumerate(_blocks(x)):
        first = number * _BLOCK_ROWS
        _require_finite(block, origins, first)
        norms[first : first + len(block)] = np.sqrt(np.einsum("nd,nd->n", block, block))
        total += block.sum(axis=0)
        extremes = extremes.merged(Extremes.of(block))
    return total / max(1, len(x)), norms, extremes


def _require_finite(block: Float64[np.ndarray, "N D"], origins: TokenOrigins, first: int) -> None:
    is_sound = np.isfinite(block)
    if not is_sound.all():
        row, dimension = np.argwhere(~is_sound)[0]
        sample, position = origins.sample[first + row], origins.position[first + row]
        where = f"sample {sample}, position {position}, dimension {dimension}"
        raise RunError(f"{where}: {block[row, dimension]}: no statistics can be made of it")


def _second_pass(
    x: Float[np.ndarray, "N D"], mean: Float64[np.ndarray, "D"]
) -> tuple[Float64[np.ndarray, "D D"], Float64[np.ndarray, "D"], float]:
    """The sums of c c^T, |c|^2 c and |c|^4; c c^T is exactly symmetric."""
    width = x.shape[1]
    scatter, cubes, fourth = np.zeros((width, width)), np.zeros(width), 0.0
    for block in _blocks(x):
        block -= mean
        scatter += block.T @ block
        squares = np.einsum("nd,nd->n", block, block)
        cubes += squares @ block
        fourth += float(squares @ squares)
    return scatter, cubes, fourth
