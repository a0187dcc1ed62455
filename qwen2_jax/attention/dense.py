"""Attention by plain operations: right on every platform, and slow where rows are long.

Axes: B rows, T query tokens, S key tokens, K kv heads, G query heads per kv head, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen2_jax.attention.logits import Scale, einsum_f32, masked_logits, scaled_logits
from qwen2_jax.rope import Tables, rotate_q_k


def dense_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    start: Int[Array, "B T"],
    rotary: Tables | None,
    *,
    scale: Scale,
    softcap: float | None,
) -> Float[Array, "B T K G H"]:
    """See `dispatch.attention`; `start` is what `logits.kv_start` gives.

    All T × T logits at once: for compilers that fuse mask and softmax, on chips with the bandwidth for the rest.
    """
    q, k = rotate_q_k(q, k, rotary)
    index = jnp.arange(q.shape[1], dtype=jnp.int32)
    logits = scaled_logits(einsum_f32("BTKGH,BSKH->BKGTS", q, k), scale, softcap)
    probs = jax.nn.softmax(_masked(logits, start, index), axis=-1).astype(v.dtype)
    return einsum_f32("BKGTS,BSKH->BTKGH", probs, v).astype(q.dtype)


def _masked(
    logits: Float[Array, "B K G T S"], start: Int[Array, "B T"], index: Int[Array, " T"]
) -> Float[Array, "B K G T S"]:
    visible_from = jnp.broadcast_to(start[:, None, None], logits.shape[:-1])
    return masked_logits(logits, visible_from, index, index)
