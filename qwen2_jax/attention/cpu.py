"""Attention on CPU: block by block with a running softmax (FlashAttention-2, arXiv:2307.08691).

Axes: B rows, T query tokens, S key tokens of a block, K kv heads, G query heads per kv head, H head_dim, C
blocks; inside a block the query heads and tokens of one row are folded into one axis R = (K, G, T).
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from qwen2_jax.attention.logits import MASK_VALUE, Scale, einsum_f32, masked_logits, scaled_logits
from qwen2_jax.rope import Tables, rotate_q_k

# Measured on XLA:CPU. A block's logits should stay in the L2 cache, and its matmuls should be large enough to be split
# over cores, which needs more query tokens when few query heads share a kv head.
KEY_BLOCK = 128
QUERY_BLOCK_FEW_GROUPS = 256
QUERY_BLOCK_MANY_GROUPS = 128
MANY_GROUPS = 4


def blockwise_attention(
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

    A block of queries visits the key blocks from its first visible key to its diagonal and no other, so the work grows
    with the samples and not with the row, and no array is larger than the inputs.
    """
    q, k = rotate_q_k(q, k, rotary)
    row = partial(_row, scale=scale, softcap=softcap)
    return lax.map(lambda operands: row(*operands), (q, k, v, start))


def _row(
    q: Float[Array, "T K G H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    start: Int[Array, " T"],
    *,
    scale: Scale,
    softcap: float | None,
) -> Float[Array, "T K G H"]:
    length, _, groups, _ = q.shape
    query_block = QUERY_BLOCK_MANY_GROUPS if groups >= MANY_GROUPS else QUERY_BLOCK_FEW_GROUPS
    k, v = _whole_blocks(k, KEY_BLOCK), _whole_blocks(v, KEY_BLOCK)
    index = jnp.arange(length, dtype=jnp.int32)
    block = partial(_query_block, k=k, v=v, scale=scale, softcap=softcap)
    blocks = tuple(_whole_blocks(x, min(length, query_block)) for x in (q, start, index))
    out = lax.map(lambda operands: block(*operands), blocks)
    return out.reshape(-1, *q.shape[1:])[:length]


def _whole_blocks(x: Shaped[Array, "T *rest"], block: int) -> Shaped[Array, "C S *rest"]:
    """Fills the last block by repeating the last token: as a query it needs no key that is not visited anyway."""
    padding = [(0, -len(x) % block)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding, mode="edge").reshape(-1, block, *x.shape[1:])


def _query_block(
    q: Float[Array, "T K G H"],
    start: Int[Array, " T"],
    index: Int[Array, " T"],
    *,
    k: Float[Array, "C S K H"],
    v: Float[Array, "C S K H"],
    scale: Scale,
    softcap: float | None,
) -> Float[Array, "T K G H"]:
    """start, index: of each query, as row indices; k, v: the row's key blocks."""
    tokens, kv_heads, groups, head_dim = q.shape
    size = k.shape[1]
    begin, end = start.min() // size, index[-1] // size + 1
    # One folded axis, not (K, G, T): XLA:CPU splits a loop over cores along the outermost axis, and K is small and odd.
    start, index = jnp.tile(start, kv_heads * groups), jnp.tile(index, kv_heads * groups)
    q = q.transpose(1, 2, 0, 3).reshape(kv_heads, groups * tokens, head_dim)

    def visit(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        m, l, acc = carry
        dots = einsum_f32("KRH,SKH->KRS", q, k[block]).reshape(-1, size)
        keys = block * size + jnp.arange(size, dtype=jnp.int32)
        logits = masked_logits(scaled_logits(dots, scale, softcap), start, index, keys)
        m_new = jnp.maximum(m, logits.max(-1))
        alpha, p = jnp.exp(m - m_new), jnp.exp(logits - m_new[:, None])
        weighted = einsum_f32("KRS,SKH->KRH", p.astype(v.dtype).reshape(kv_heads, -1, size), v[block])
        return m_new, alpha * l + p.sum(-1), alpha[:, None] * acc + weighted.reshape(-1, head_dim)

    # Made from q, not from nothing, so that inside shard_map the carry varies over the mesh as what replaces it does.
    acc = jnp.zeros_like(q, jnp.float32).reshape(-1, head_dim)
    l = jnp.zeros_like(acc[:, 0])
    _, l, acc = lax.fori_loop(begin, end, visit, (jnp.full_like(l, MASK_VALUE), l, acc))
    out = (acc / l[:, None]).astype(q.dtype)
    return out.reshape(kv_heads, groups, tokens, head_dim).transpose(2, 0, 1, 3)
