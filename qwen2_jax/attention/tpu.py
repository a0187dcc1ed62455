"""Attention on TPU: JAX's splash kernel, told by arrays rather than by a static mask what each query sees.

Axis letters: B rows, T query tokens, K kv heads, G query heads per kv head, H head_dim; N = K G, all query heads, and
P = B T, the tokens of all rows one after another.

The kernel asks two things of its mask. Which blocks of keys a block of queries visits is read from two small arrays, so
it may depend on the data: blocks of other samples, or outside of a traced window, cost nothing. Which keys a query sees
inside a block comes from a function of one integer a query, so that integer holds the query's place and its reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    BlockSizes,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from qwen2_jax.attention.logits import Scale
from qwen2_jax.rope import Tables

# The longer a block, the less often the kernel starts anew; a block of logits must fit on the chip.
_LANES = 128
_BLOCKS = (512, 384, 256, 128)


@dataclass(frozen=True)
class _Reach:
    """Which keys a query sees, from `place << bits | reach`. Hashable: it is part of what is compiled."""

    bits: int

    def __call__(self, query: Int[Array, "Q S"], key: Int[Array, "Q S"]) -> Bool[Array, "Q S"]:
        back = (query >> self.bits) - key
        return (back >= 0) & (back <= (query & ((1 << self.bits) - 1)))


def block_of(length: int) -> int:
    """Tokens of a block of queries, and of keys, in rows of `length` tokens, a multiple of 128."""
    return next(block for block in _BLOCKS if length % block == 0)


def splash_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    start: Int[Array, "B T"],
    rotary: Tables | None,
    *,
    scale: Scale,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "B T K G H"]:
    """See `dispatch.attention`; `start` is what `logits.kv_start` gives.

    The scale is part of the queries, which are rounded once, after rotation and scale. Rows are strung together, so
    that heads come first as the kernel wants them and projections can write and read that layout.
    interpret: run the kernel without a TPU.
    """
    rows, length, kv_heads, groups, head_dim = q.shape
    q, k = _placed(q.reshape(rows, length, -1, head_dim), rotary, scale), _placed(k, rotary)
    bits, block = (length - 1).bit_length(), block_of(length)
    kernel = SplashAttentionKernel(
        _mask_info(start, block, bits),
        None,
        None,
        block_sizes=BlockSizes(block_q=block, block_kv=block),
        is_mqa=False,
        save_residuals=False,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=None,
        mask_function=_Reach(bits),
        interpret=interpret,
    )
    out = cast(Array, kernel(q, k, _heads_first(v)))  # alone, since no residuals are saved
    return out.swapaxes(0, 1).reshape(rows, length, kv_heads, groups, head_dim)


def _heads_first(x: Float[Array, "B T N H"]) -> Float[Array, "N P H"]:
    return x.reshape(-1, *x.shape[2:]).swapaxes(0, 1)


def _placed(x: Float[Array, "B T N H"], rotary: Tables | None, scale: Scale = 1.0) -> Float[Array, "N P H"]:
    """Rotated, scaled, heads first. By the compiler's cycles, whole lanes are best turned where they are to lie."""
    if rotary is None:
        return _heads_first((x.astype(jnp.float32) * scale).astype(x.dtype))
    n_pairs = rotary[0].shape[-1]
    cos, sin = _widened(rotary[0], x.shape[-1], fixed=1.0), _widened(rotary[1], x.shape[-1], fixed=0.0)
    if x.shape[-1] % _LANES:
        return _heads_first(_turned(x, cos[:, :, None], sin[:, :, None], n_pairs, scale))
    cos, sin = (table.reshape(-1, table.shape[-1]) for table in (cos, sin))
    return _turned(_heads_first(x), cos, sin, n_pairs, scale)


def _widened(table: Float[Array, "B T R"], head_dim: int, *, fixed: float) -> Float[Array, "B T H"]:
    """One value for each dimension of a head: both of a pair alike, `fixed` for those that do not turn."""
    both = jnp.concatenate([table, table], axis=-1)
    return jnp.pad(both, ((0, 0), (0, 0), (0, head_dim - both.shape[-1])), constant_values=fixed)


def _turned(
    x: Float[Array, "*P H"], cos: Float[Array, "*#P H"], sin: Float[Array, "*#P H"], n_pairs: int, scale: Scale
) -> Float[Array, "*P H"]:
    """`rope.rotate` and a scale, rounded once.

    The other dimension of each pair comes from a product with a matrix of ones: exact, and cheaper than moving lanes.
    """
    others = np.zeros((x.shape[-1], x.shape[-1]), np.float32)
    pairs = np.arange(n_pairs)
    others[pairs + n_pairs, pairs], others[pairs, pairs + n_pairs] = -1, 1
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    other = jnp.einsum(
        "...H,HI->...I", x, others.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32
    )
    return ((x.astype(jnp.float32) * cos + other * sin) * scale).astype(x.dtype)


def _mask_info(start: Int[Array, "B T"], block: int, bits: int) -> MaskInfo:
    """start counts within a row, what is made of it in all rows together."""
    rows, length = start.shape
    place = jnp.arange(rows * length, dtype=jnp.int32)
    start = (start + length * jnp.arange(rows, dtype=jnp.int32)[:, None]).reshape(-1)
    begin = start.reshape(-1, block).min(1, keepdims=True) // block
    end = jnp.arange(len(begin), dtype=jnp.int32)[:, None]
    visited = begin + jnp.arange(length // block, dtype=jnp.int32)
    return MaskInfo(
        data_next=jnp.minimum(visited, end)[None],  # what is not visited is not fetched either: the last block stays
        mask_next=None,
        block_mask=(visited <= end).astype(jnp.int32)[None],
        partial_mask_blocks=None,
        q_sequence=place << bits | (place - start),  # type: ignore[arg-type]  # annotated as numpy's, passed on as is
    )
