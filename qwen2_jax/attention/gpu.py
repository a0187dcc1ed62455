"""Attention on GPU: a Triton kernel, by Pallas, that is told by an array which keys each query sees.

Axis letters: B rows, T tokens, K kv heads, G query heads per kv head, N = K G, all query heads, H head_dim; Q queries
and S keys of a block.

A block of queries meets the blocks of keys from the first that any of its queries sees to its own, and no other, so
that samples and windows need no mask of T × T and cost what they hold. The softmax runs along
(FlashAttention-2, arXiv:2307.08691).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from qwen2_jax.attention.gpu_tiles import Tiles
from qwen2_jax.attention.logits import MASK_VALUE, Scale
from qwen2_jax.rope import Tables, rotate_q_k

# The unit that computes exponentials takes powers of two.
_LOG2_E = math.log2(math.e)
# The narrowest matrices that Triton multiplies.
_NARROWEST = 16


def triton_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    start: Int[Array, "B T"],
    rotary: Tables | None,
    *,
    scale: Scale,
    softcap: float | None,
    tiles: Tiles,
    interpret: bool = False,
) -> Float[Array, "B T K G H"]:
    """See `dispatch.attention`; `start` is what `logits.kv_start` gives, T a multiple of 128.

    interpret: run the kernel without a GPU.
    """
    q, k = rotate_q_k(q, k, rotary)
    rows, length, kv_heads, groups, head_dim = q.shape
    width = max(_NARROWEST, pl.next_power_of_2(head_dim))
    last = length // tiles.queries - 1
    # The longest way comes first: blocks at the end of a row meet the most keys.
    queries = pl.BlockSpec((None, tiles.queries, None, width), lambda i, n, b: (b, last - i, n, 0))
    keys = pl.BlockSpec((None, length, None, width), lambda i, n, b: (b, 0, lax.div(n, groups), 0))
    out = pl.pallas_call(
        partial(_kernel, tiles=tiles, head_dim=head_dim, softcap=softcap),
        grid=(last + 1, kv_heads * groups, rows),
        in_specs=[
            pl.BlockSpec((1,), lambda i, n, b: (0,)),
            pl.BlockSpec((None, tiles.queries), lambda i, n, b: (b, last - i)),
            queries,
            keys,
            keys,
        ],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct((rows, length, kv_heads * groups, head_dim), q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="attention",
    )(jnp.asarray(scale, jnp.float32).reshape(1), start, q.reshape(rows, length, -1, head_dim), k, v)
    return out.reshape(q.shape)


def _kernel(
    scale_ref: Any,
    start_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    *,
    tiles: Tiles,
    head_dim: int,
    softcap: float | None,
) -> None:
    """One block of queries of one head. k_ref, v_ref: (T, H) of the row. Widths are padded to powers of two."""
    width = q_ref.shape[-1]
    held = None if width == head_dim else (jnp.arange(width) < head_dim)[None]
    load = partial(plgpu.load, mask=held, other=None if held is None else 0.0)
    block = pl.num_programs(0) - 1 - pl.program_id(0)
    place = block * tiles.queries + jnp.arange(tiles.queries, dtype=jnp.int32)
    start, q, scale = start_ref[...], load(q_ref), scale_ref[0]

    def visit(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        m, l, acc = carry
        tokens = pl.ds(index * tiles.keys, tiles.keys)
        logits = _powers(plgpu.dot(q, load(k_ref.at[tokens]).T), scale, softcap)
        key = index * tiles.keys + jnp.arange(tiles.keys, dtype=jnp.int32)
        visible = (start[:, None] <= key) & (key <= place[:, None])
        logits = jnp.where(visible, logits, MASK_VALUE)
        m_new = jnp.maximum(m, logits.max(axis=-1))
        alpha, p = jnp.exp2(m - m_new), jnp.exp2(logits - m_new[:, None])
        weighted = plgpu.dot(p.astype(v_ref.dtype), load(v_ref.at[tokens]))
        return m_new, alpha * l + p.sum(axis=-1), alpha[:, None] * acc + weighted

    begin = lax.div(jnp.min(start), tiles.keys)
    end = lax.div((block + 1) * tiles.queries + tiles.keys - 1, tiles.keys)
    l = jnp.zeros((tiles.queries,), jnp.float32)
    carry = (l + MASK_VALUE, l, jnp.zeros((tiles.queries, width), jnp.float32))
    _, l, acc = lax.fori_loop(begin, end, visit, carry)
    plgpu.store(out_ref, (acc / l[:, None]).astype(out_ref.dtype), mask=held)


def _powers(dots: Array, scale: Array, softcap: float | None) -> Array:
    """Logits over log(2). With a cap, tanh(x) is 1 - 2 / (exp(2 x) + 1), whose ends are exact where exp overflows."""
    if softcap is None:
        return dots * (scale * _LOG2_E)
    grown = jnp.exp2(dots * (scale * (2 * _LOG2_E / softcap)))
    return (softcap * _LOG2_E) * (1 - 2 / (grown + 1))
