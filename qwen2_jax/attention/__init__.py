"""Causal grouped-query attention over packed rows.

Axis letters: B rows, T query tokens, S key tokens, K kv heads, G query heads per kv head, H head_dim;
inside a block the query heads and tokens of one row are folded into one axis R = (K, G, T).

What a query sees is always one run of the row: from the first token of its own segment (or of its window, whichever is
later) to itself. All implementations work from that first visible index alone; segment ids are not looked at again.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from qwen2_jax.rope import Tables, rotate

if TYPE_CHECKING:
    from qwen2_jax.attention.gpu_tiles import Tiles

# Finite, so that a block in which a query sees nothing gives numbers that its own block wipes out, not NaN.
MASKED_LOGIT = -1e30

# Measured on XLA:CPU. A block's logits should stay in the L2 cache, and its matmuls should be large enough to be split
# over cores, which needs more query tokens when few query heads share a kv head.
KEY_BLOCK = 128
QUERY_BLOCK_FEW_GROUPS = 256
QUERY_BLOCK_MANY_GROUPS = 128
MANY_GROUPS = 4

# Rows of another length are not cut into whole blocks of the kernels for TPU and GPU.
ROW_MULTIPLE = 128

# From the products of queries and keys to logits, before the mask.
LogitOf = Callable[[Array], Array]
# From q, k, v, the first visible index and the rotary tables, if any, to the output.
AttentionPath = Callable[[Array, Array, Array, Array, Tables | None], Array]


def attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: float | Float[Array, ""],
    window: Int[Array, ""] | None = None,
    softcap: float | None = None,
    rotary: Tables | None = None,
) -> Float[Array, "B T K G H"]:
    """softmax(scale · q kᵀ + mask) v, causal inside each segment, in the dtype of q.

    With `rotary`, q and k are rotated first (`rope.rotate`), each path in the layout that suits it.
    A segment is a run of equal non-zero ids; 0 is padding, whose outputs are finite and mean nothing.
    With `window` (in tokens, at least 1, may be traced) a query at t sees the keys s with t - s < window.
    With `softcap` the scaled logits l become softcap · tanh(l / softcap) before the mask, as Gemma 2 has it.
    Logits and softmax are float32 whatever the inputs are; probabilities are rounded to the dtype of v before they meet
    v, as in the eager attention of transformers.

    Rows are independent, and so are kv heads, but on CPU rows are looped over and trip counts depend on the data, which
    the partitioner cannot split. With B or K sharded over a mesh, call it inside `jax.shard_map` over those axes: each
    device then loops over its own blocks and nothing is communicated.
    """
    first = first_visible(segment_ids, window)
    logit_of = partial(_logits, scale=scale, softcap=softcap)
    paths: dict[str, AttentionPath] = {"cpu": _rotated(partial(_blockwise, logit_of=logit_of))}
    if _suits_splash(q):
        # Its import takes longer than that of this package, and float32, which CPUs compute in, has no use for it.
        from qwen2_jax.attention.tpu import splash_attention

        paths["tpu"] = partial(splash_attention, scale=scale, softcap=softcap)
    if tiles := kernel_tiles(q, softcap):
        from qwen2_jax.attention.gpu import triton_attention

        paths["cuda"] = partial(triton_attention, scale=scale, softcap=softcap, tiles=tiles)
    # Chosen when lowering, not from the default backend: a CPU host also compiles ahead of time for TPUs.
    return lax.platform_dependent(q, k, v, first, rotary, **paths, default=dense_path(scale, softcap))


def dense_path(scale: float | Array, softcap: float | None) -> AttentionPath:
    """What compilers make of plain operations: right everywhere, and slow where rows are long."""
    return _rotated(partial(_dense, logit_of=partial(_logits, scale=scale, softcap=softcap)))


def _suits_splash(q: Float[Array, "B T K G H"]) -> bool:
    """The kernel multiplies in bfloat16, whole blocks of tokens, and names a token's place and reach in 31 bits."""
    rows, length = q.shape[:2]
    bits = (rows * length - 1).bit_length() + (length - 1).bit_length()
    return q.dtype == jnp.bfloat16 and length % ROW_MULTIPLE == 0 and bits <= 31


def kernel_tiles(q: Float[Array, "B T K G H"] | jax.ShapeDtypeStruct, softcap: float | None) -> "Tiles | None":
    """How the GPU's kernel cuts its work: on the GPU of this process, or one that is not here but compiled for.

    None where `attention` takes no such kernel. Raises ModelError when the GPU's memory is too full to find out.
    """
    if q.dtype != jnp.bfloat16 or q.shape[1] % ROW_MULTIPLE:
        return None
    target = jax.sharding.get_abstract_mesh().abstract_device
    if not _has_cuda() and (target is None or target.platform != "gpu"):
        return None
    from qwen2_jax.attention.gpu_tiles import candidates, usable_tiles

    return usable_tiles(q.shape[-1], softcap) if _has_cuda() else candidates(q.shape[-1])[0]


def _has_cuda() -> bool:
    return jax.default_backend() == "gpu" and "cuda" in jax.local_devices()[0].client.platform_version


def _rotated(path: Callable[[Array, Array, Array, Array], Array]) -> AttentionPath:
    def rotate_first(q: Array, k: Array, v: Array, first: Array, rotary: Tables | None) -> Array:
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return path(q, k, v, first)

    return rotate_first


def first_visible(segment_ids: Int[Array, "B T"], window: Int[Array, ""] | None = None) -> Int[Array, "B T"]:
    """The row index of the first key that each query sees; the last is always the query itself. Padding sees itself."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    starts = segment_ids != jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    first = lax.cummax(jnp.where(starts, index, 0), axis=1)
    if window is not None:
        first = jnp.maximum(first, index - window + 1)
    return jnp.where(segment_ids == 0, index, first)


def _einsum(subscripts: str, x: Array, y: Array) -> Array:
    """Accumulates in float32. float32 asks for full precision: accelerators otherwise multiply it in bf16 or TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)


def _logits(dots: Array, scale: float | Array, softcap: float | None) -> Array:
    logits = dots * scale
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _masked(logits: Array, first: Array, query: Array, key: Array) -> Array:
    """logits: float32 (..., R, S); first: (..., R), query: (R,) and key: (S,) are row indices."""
    visible = (first[..., :, None] <= key) & (key <= query[:, None])
    return jnp.where(visible, logits, MASKED_LOGIT)


def _dense(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    first: Int[Array, "B T"],
    *,
    logit_of: LogitOf,
) -> Float[Array, "B T K G H"]:
    """All T × T logits at once: for compilers that fuse mask and softmax, on chips with the bandwidth for the rest."""
    index = jnp.arange(q.shape[1], dtype=jnp.int32)
    dots = _einsum("BTKGH,BSKH->BKGTS", q, k)
    logits = _masked(logit_of(dots), first[:, None, None], index, index)
    probs = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return _einsum("BKGTS,BSKH->BTKGH", probs, v).astype(q.dtype)


def _blockwise(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    first: Int[Array, "B T"],
    *,
    logit_of: LogitOf,
) -> Float[Array, "B T K G H"]:
    """Block by block with a running softmax (FlashAttention-2, arXiv:2307.08691).

    A block of queries visits the key blocks from its first visible key to its diagonal and no other, so the work grows
    with the samples and not with the row, and no array is larger than the inputs.
    """

    def row(operands: tuple[Array, Array, Array, Array]) -> Array:
        return _blockwise_row(*operands, logit_of)

    return lax.map(row, (q, k, v, first))


def _blockwise_row(
    q: Float[Array, "T K G H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    first: Int[Array, "T"],
    logit_of: LogitOf,
) -> Float[Array, "T K G H"]:
    length, _, groups, _ = q.shape
    query_block = QUERY_BLOCK_MANY_GROUPS if groups >= MANY_GROUPS else QUERY_BLOCK_FEW_GROUPS
    k, v = _whole_blocks(k, KEY_BLOCK), _whole_blocks(v, KEY_BLOCK)
    index = jnp.arange(length, dtype=jnp.int32)

    def block(operands: tuple[Array, Array, Array]) -> Array:
        return _query_block(*operands, k, v, logit_of)

    out = lax.map(block, tuple(_whole_blocks(x, min(length, query_block)) for x in (q, first, index)))
    return out.reshape(-1, *q.shape[1:])[:length]


def _whole_blocks(x: Shaped[Array, "T ..."], block: int) -> Shaped[Array, "N {block} ..."]:
    """Fills the last block by repeating the last token: as a query it needs no key that is not visited anyway."""
    padding = [(0, -len(x) % block)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding, mode="edge").reshape(-1, block, *x.shape[1:])


def _query_block(
    q: Float[Array, "T K G H"],
    first: Int[Array, "T"],
    index: Int[Array, "T"],
    k: Float[Array, "N S K H"],
    v: Float[Array, "N S K H"],
    logit_of: LogitOf,
) -> Float[Array, "T K G H"]:
    """first, index: of each query, as row indices; k, v: the row's N key blocks."""
    tokens, kv_heads, groups, head_dim = q.shape
    size = k.shape[1]
    begin, end = first.min() // size, index[-1] // size + 1
    # One folded axis, not (K, G, T): XLA:CPU splits a loop over cores along the outermost axis, and K is small and odd.
    first, index = jnp.tile(first, kv_heads * groups), jnp.tile(index, kv_heads * groups)
    q = q.transpose(1, 2, 0, 3).reshape(kv_heads, groups * tokens, head_dim)

    def visit(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, out = carry
        dots = _einsum("KRH,SKH->KRS", q, k[block]).reshape(-1, size)
        logits = _masked(logit_of(dots), first, index, block * size + jnp.arange(size, dtype=jnp.int32))
        new_peak = jnp.maximum(peak, logits.max(-1))
        keep, probs = jnp.exp(peak - new_peak), jnp.exp(logits - new_peak[:, None])
        weights = probs.astype(v.dtype).reshape(kv_heads, -1, size)
        seen = _einsum("KRS,SKH->KRH", weights, v[block])
        return new_peak, keep * total + probs.sum(-1), keep[:, None] * out + seen.reshape(-1, head_dim)

    # Made from q, not from nothing, so that inside shard_map the carry varies over the mesh as what replaces it does.
    out = jnp.zeros_like(q, jnp.float32).reshape(-1, head_dim)
    total = jnp.zeros_like(out[:, 0])
    _, total, out = lax.fori_loop(begin, end, visit, (jnp.full_like(total, MASKED_LOGIT), total, out))
    out = (out / total[:, None]).astype(q.dtype)
    return out.reshape(kv_heads, groups, tokens, head_dim).transpose(2, 0, 1, 3)
