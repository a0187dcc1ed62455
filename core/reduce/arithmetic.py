"""The arithmetic of `core.reduce.reductions` in JAX, in float32: pure functions of one step's activations.

Axis letters: L stored layers of a site, B rows of a step, K fetched tokens of a row, S samples of a row, P pools, U
stored rows of a row of the step (K, or S times P), E width of a stored row, W its stored values, G its blocks, C values
of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, Num, Shaped

from core.reduce.reductions import INDICES, LARGEST_CODE, QUANTIZATIONS, SCALE, VALUES, Pool, Quantization, Reduction
from core.step.fetching import Fetch


class StepRows(NamedTuple):
    """The pools and stored rows of a step's tokens, computed on the host and copied to the device.

    Attributes:
      weights: of each fetched token in each pool of its sample; P is 0 without pools.
      slots: which of its row's samples a token belongs to; S for one that is not stored.
      is_stored: which of the resulting rows are stored.
    """

    weights: Float32[Array | np.ndarray, "P B K"]
    slots: Int32[Array | np.ndarray, "B K"]
    is_stored: Bool[Array | np.ndarray, "B U"]

    @classmethod
    def of(cls, fetch: Fetch) -> "StepRows":
        """Of what is fetched of a step."""
        n_rows = len(fetch.is_stored)
        weights = np.zeros((0, n_rows, 0), np.float32) if fetch.weights is None else fetch.weights
        slots = np.zeros((n_rows, 0), np.int32) if fetch.slots is None else fetch.slots
        return cls(weights, slots, fetch.is_stored)


class ReducedSite(NamedTuple):
    """One reduced site.

    Attributes:
      arrays: by the names of `Reduction.arrays`, (L, B, U, width).
      peaks: the largest magnitude of each row before it is coded or cast; infinity for a NaN or infinity, also of a
        token that it was pooled from.
      losses: over the stored rows of each row of the step: the sum of the relative L2 errors of the restored rows, and
        the smallest cosine.
    """

    arrays: dict[str, Shaped[Array, "L B U _"]]
    peaks: Float32[Array, "L B U"]
    losses: Float32[Array, "L B 2"]


def reduce_site(
    x: Float[Array, "L B K D"],
    step: StepRows,
    matrices: tuple[Float32[Array, "M D E"], Float32[Array, "N D"]] | None,
    reduction: Reduction,
    dtype: np.dtype,
) -> ReducedSite:
    """Projects, pools, cuts to topk and quantizes as `reduction` says; selection has been done.

    matrices: the projection's matrices and the means that it subtracts; M or N = 1 for all layers, else L.
    dtype: the dtype of values that are not quantized.
    """
    x = x.astype(jnp.float32)
    if matrices is not None:
        matrix, mean = matrices
        x = jnp.matmul(x - mean[:, None, None], matrix[:, None], precision=jax.lax.Precision.HIGHEST)
    is_sound = jnp.isfinite(x).all(axis=-1)
    if reduction.pools:
        x, is_sound = pool_tokens(x, is_sound, step, reduction.pools)
    peaks = jnp.where(is_sound, jnp.max(jnp.abs(x), axis=-1), jnp.inf)
    rows, arrays = x, {}
    if reduction.topk is not None:
        _, indices = jax.lax.top_k(jnp.abs(x), reduction.topk)
        rows = jnp.take_along_axis(x, indices, axis=-1)
        arrays[INDICES] = indices.astype(reduction.arrays(x.shape[-1], dtype)[INDICES].dtype)
    arrays[VALUES], restored = rows.astype(dtype), rows
    if reduction.quantization is not None:
        arrays[VALUES], arrays[SCALE], restored = quantize(rows, reduction.quantization)
    losses = _losses(x, rows, restored, peaks, step.is_stored)
    return ReducedSite(arrays, peaks, losses)


def pool_tokens(
    x: Float32[Array, "L B K E"], is_sound: Bool[Array, "L B K"], step: StepRows, pools: tuple[Pool, ...]
) -> tuple[Float32[Array, "L B U E"], Bool[Array, "L B U"]]:
    """The pools of every sample, side by side, and whether all of their inputs are finite.

    Sums are matrix products, whose order of addition is fixed; that of a GPU's scattered additions is not.
    """
    n_samples = step.is_stored.shape[1] // len(pools)
    is_member = step.slots[:, None] == jnp.arange(n_samples)[:, None]
    # A NaN with weight 0 would still make the other samples of its row NaN.
    finite = jnp.where(jnp.isfinite(x), x, 0)
    pooled, sound = [], []
    for pool, weights in zip(pools, step.weights, strict=True):
        shares = jnp.where(is_member, weights[:, None], 0)
        pooled.append(_weighted_sums(shares, finite) if pool.is_linear else _maxima(finite, step.slots, n_samples))
        unsound = _weighted_sums((shares > 0).astype(jnp.float32), (~is_sound[..., None]).astype(jnp.float32))
        sound.append(unsound[..., 0] == 0)
    layers, rows, _, width = x.shape
    shape = (layers, rows, n_samples * len(pools))
    return jnp.stack(pooled, axis=3).reshape(*shape, width), jnp.stack(sound, axis=3).reshape(shape)


def _weighted_sums(shares: Float32[Array, "B S K"], x: Float32[Array, "L B K E"]) -> Float32[Array, "L B S E"]:
    return jnp.einsum("bsk,lbke->lbse", shares, x, precision=jax.lax.Precision.HIGHEST)


def _maxima(
    x: Float32[Array, "L B K E"], slots: Int32[Array | np.ndarray, "B K"], n_samples: int
) -> Float32[Array, "L B S E"]:
    def of_row(row: Float32[Array, "K E"], slots: Int32[Array | np.ndarray, "K"]) -> Float32[Array, "S E"]:
        found = jax.ops.segment_max(row, slots, n_samples + 1)[:n_samples]
        return jnp.where(jnp.isfinite(found), found, 0)  # a slot without a sample

    return jax.vmap(jax.vmap(of_row), in_axes=(0, None))(x, slots)


def quantize(
    rows: Float32[Array, "*rows W"], quantization: Quantization
) -> tuple[Num[Array, "*rows W"], Float32[Array, "*rows G"], Float32[Array, "*rows W"]]:
    """Codes, the scale of each block, and the restored rows: code times scale.

    The largest magnitude of a block gets the largest code. A block of zeros has scale 0.
    """
    width, n_scales = rows.shape[-1], quantization.n_scales(rows.shape[-1])
    block = quantization.block or width
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, n_scales * block - width)]
    blocks: Float32[Array, "*rows G C"] = jnp.pad(rows, padding).reshape(*rows.shape[:-1], n_scales, block)
    largest = LARGEST_CODE[quantization.kind]
    scale = jnp.max(jnp.abs(blocks), axis=-1) / largest
    ratio = jnp.clip(blocks / jnp.where(scale > 0, scale, 1)[..., None], -largest, largest)
    dtype = QUANTIZATIONS[quantization.kind]
    codes = (jnp.round(ratio) if dtype == np.int8 else ratio).astype(dtype)
    restored = codes.astype(jnp.float32) * scale[..., None]
    return _unblocked(codes, width), scale, _unblocked(restored, width)


def _unblocked(blocks: Num[Array, "*rows G C"], width: int) -> Num[Array, "*rows W"]:
    return blocks.reshape(*blocks.shape[:-2], -1)[..., :width]


def _losses(
    x: Float32[Array, "L B U E"],
    largest: Float32[Array, "L B U W"],
    restored: Float32[Array, "L B U W"],
    peaks: Float32[Array, "L B U"],
    is_stored: Bool[Array | np.ndarray, "B U"],
) -> Float32[Array, "L B 2"]:
    """The losses of `ReducedSite`. largest: the values of x that topk stores, else x.

    Rows are divided by their peak first, because squares of float32 values may overflow.
    """
    unit = jnp.where((peaks > 0) & jnp.isfinite(peaks), peaks, 1)[..., None]
    x, largest, restored = x / unit, largest / unit, restored / unit
    length, found = jnp.sum(x * x, axis=-1), jnp.sum(restored * restored, axis=-1)
    left_out = jnp.maximum(length - jnp.sum(largest * largest, axis=-1), 0) if largest.shape != x.shape else 0
    error = jnp.sqrt(left_out + jnp.sum((largest - restored) ** 2, axis=-1))
    relative = jnp.where(length > 0, error / jnp.sqrt(jnp.where(length > 0, length, 1)), 0)
    lengths = jnp.sqrt(length * found)
    cosine = jnp.where(lengths > 0, jnp.sum(largest * restored, axis=-1) / jnp.where(lengths > 0, lengths, 1), 1)
    total = jnp.sum(jnp.where(is_stored, relative, 0), axis=-1)
    return jnp.stack([total, jnp.min(jnp.where(is_stored, cosine, 1), axis=-1)], axis=-1)
