"""The moments of a step where its activations are: float32 on the device, float64 once they are fetched.

Axis letters: B rows of a step, T tokens of a row, D width of a token, N tokens that count.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from analysis.moments.extremes import Extremes
from analysis.moments.largest import LargestTokens, TokenOrigins
from analysis.moments.moments import LARGEST_TOKENS, Moments
from analysis.moments.norms import Norms
from core.base.errors import RunError

BLOCK_TOKENS = 1024
"""Tokens of one float32 matrix product: its rounding grows with their number, the cost of adding products falls."""
_HIGHEST = jax.lax.Precision.HIGHEST


class DeviceSums(NamedTuple):
    """Sums over tokens that count, y = x - shift; each float is a float32 and what rounding left out of it.

    Attributes:
      n_tokens: at most 2^31 - 1: fetch before.
      shift: near the mean, fixed at the first token, so that squares do not cancel.
      total, scatter, cubes, fourth: the sums of y, y y^T, |y|^2 y and |y|^4.
      low, high: of x, by dimension.
    """

    n_tokens: Int32[Array, ""]
    shift: Float32[Array, "D"]
    total: Float32[Array, "2 D"]
    scatter: Float32[Array, "2 D D"]
    cubes: Float32[Array, "2 D"]
    fourth: Float32[Array, "2"]
    low: Float32[Array, "D"]
    high: Float32[Array, "D"]


class StepMoments(NamedTuple):
    """The sums up to and including a step, and the norms of its tokens; 0 for those that do not count."""

    sums: DeviceSums
    norms: Float32[Array, "B T"]


@jax.jit
def device_moments(
    x: Float[Array | np.ndarray, "B T D"], mask: Bool[Array | np.ndarray, "B T"], before: DeviceSums | None = None
) -> StepMoments:
    """Adds the tokens of a step to the sums of those before it, on the device.

    Args:
      x: of any float dtype; upcast to float32 block by block. What lies outside of the mask may be NaN.
      mask: which tokens count.
      before: of earlier steps; None begins.

    Matrix products ask for full float32 whatever the default precision, and the sums of blocks are compensated, so
    the error of a covariance does not grow with the number of tokens. Source: Knuth's two-sum (TAOCP 2, 4.2.2).
    """
    sums = _no_sums(x.shape[2]) if before is None else before
    # The mean of the first tokens need not be exact: any shift near the mean does.
    sums = sums._replace(shift=jnp.where(sums.n_tokens > 0, sums.shift, _rough_mean(x, mask)))
    tokens = max(1, min(BLOCK_TOKENS // x.shape[0], x.shape[1]))
    missing = -x.shape[1] % tokens
    x, mask = jnp.pad(x, ((0, 0), (0, missing), (0, 0))), jnp.pad(mask, ((0, 0), (0, missing)))

    def add(sums: DeviceSums, start: Int32[Array, ""]) -> tuple[DeviceSums, Float32[Array, "B _"]]:
        block = jax.lax.dynamic_slice_in_dim(x, start, tokens, axis=1).astype(jnp.float32)
        return _add_block(sums, block, jax.lax.dynamic_slice_in_dim(mask, start, tokens, axis=1))

    sums, norms = jax.lax.scan(add, sums, jnp.arange(0, x.shape[1], tokens))
    norms = jnp.moveaxis(norms, 0, 1).reshape(mask.shape)
    return StepMoments(sums, norms[:, : mask.shape[1] - missing])


def _no_sums(width: int) -> DeviceSums:
    zeros = jnp.zeros(width, jnp.float32)
    pair = jnp.zeros((2, width), jnp.float32)
    scatter, fourth = jnp.zeros((2, width, width), jnp.float32), jnp.zeros(2, jnp.float32)
    return DeviceSums(jnp.int32(0), zeros, pair, scatter, pair, fourth, zeros + jnp.inf, zeros - jnp.inf)


def _rough_mean(x: Float[Array | np.ndarray, "B T D"], mask: Bool[Array | np.ndarray, "B T"]) -> Float32[Array, "D"]:
    total = jnp.sum(jnp.where(mask[..., None], x, 0), axis=(0, 1), dtype=jnp.float32)
    return total / jnp.maximum(1, jnp.sum(mask))


def _add_block(
    sums: DeviceSums, x: Float32[Array, "B T D"], mask: Bool[Array, "B T"]
) -> tuple[DeviceSums, Float32[Array, "B T"]]:
    counts = mask[..., None]
    y = jnp.where(counts, x - sums.shift, 0)
    squares = jnp.sum(y * y, axis=-1)
    sums = DeviceSums(
        n_tokens=sums.n_tokens + jnp.sum(mask, dtype=jnp.int32),
        shift=sums.shift,
        total=_plus(sums.total, jnp.sum(y, axis=(0, 1))),
        scatter=_plus(sums.scatter, jnp.einsum("BTD,BTE->DE", y, y, precision=_HIGHEST)),
        cubes=_plus(sums.cubes, jnp.einsum("BT,BTD->D", squares, y, precision=_HIGHEST)),
        fourth=_plus(sums.fourth, jnp.sum(squares * squares)),
        low=jnp.minimum(sums.low, jnp.min(jnp.where(counts, x, jnp.inf), axis=(0, 1))),
        high=jnp.maximum(sums.high, jnp.max(jnp.where(counts, x, -jnp.inf), axis=(0, 1))),
    )
    return sums, jnp.sqrt(jnp.sum(jnp.where(counts, x * x, 0), axis=-1))


def _plus(pair: Float32[Array, "2 *shape"], addend: Float32[Array, "*shape"]) -> Float32[Array, "2 *shape"]:
    """Adds to a float32 and to what earlier roundings left out of it."""
    high, low = pair
    total = high + addend
    of_addend = total - high
    lost = (high - (total - of_addend)) + (addend - of_addend)
    return jnp.stack([total, low + lost])


def moments_of_device(
    sums: DeviceSums,
    norms: Float[np.ndarray, "N"],
    origins: TokenOrigins | None = None,
    largest: int = LARGEST_TOKENS,
) -> Moments:
    """Fetches the sums and moves them from the shift to the mean, in float64.

    norms, origins: of the tokens that counted, of all steps. Norms are float32's, so a token whose norm is nearer to
    the edge of a bin than that may be in the bin beside the one that `Moments.of` puts it in.

    Raises RunError if a token held NaN or infinity, or values whose fourth powers overflow float32.
    """
    count = int(sums.n_tokens)
    if len(norms) != count:
        raise ValueError(f"{len(norms)} norms of {count} tokens")
    origins = TokenOrigins.of_rows(count) if origins is None else origins
    _require_sound(sums, norms, origins)
    shift = np.asarray(sums.shift, np.float64)
    total, scatter, cubes, fourth = (
        np.asarray(pair, np.float64).sum(axis=0) for pair in (sums.total, sums.scatter, sums.cubes, sums.fourth)
    )
    by = total / max(1, count)
    along, length, trace = scatter @ by, float(by @ by), float(np.trace(scatter))
    fourth += -4 * cubes @ by + 4 * by @ along + 2 * length * trace - 3 * count * length * length
    cubes += -2 * along + (2 * count * length - trace) * by
    scatter -= np.outer(by, by) * count
    scatter = (scatter + scatter.T) / 2
    norms = np.asarray(norms, np.float64)
    extremes = Extremes(np.asarray(sums.low, np.float64), np.asarray(sums.high, np.float64))
    tokens = LargestTokens.of(norms, origins, largest)
    return Moments(count, shift + by, scatter, cubes, float(fourth), Norms.of(norms), extremes, tokens)


def _require_sound(sums: DeviceSums, norms: Float[np.ndarray, "N"], origins: TokenOrigins) -> None:
    bad = np.flatnonzero(~np.isfinite(norms))
    if len(bad):
        where = f"sample {origins.sample[bad[0]]}, position {origins.position[bad[0]]}"
        raise RunError(
            f"{where}: its values are not finite, or their squares overflow: no statistics can be made of it"
        )
    if not np.isfinite(np.asarray(sums.fourth)).all():
        peak = np.max(np.abs([np.asarray(sums.low), np.asarray(sums.high)]))
        raise RunError(f"values of magnitude {peak:.1e}: their fourth powers overflow float32")
