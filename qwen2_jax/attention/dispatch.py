"""Causal grouped-query attention over packed rows: one function, and the implementation that suits the platform.

Axes: B rows, T tokens, K kv heads, G query heads per kv head, H head_dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qwen2_jax.attention.cpu import blockwise_attention
from qwen2_jax.attention.dense import dense_attention
from qwen2_jax.attention.gpu_tiles import Tiles, candidates
from qwen2_jax.attention.logits import Scale, kv_start
from qwen2_jax.rope import Tables

# Rows of another length are not cut into whole blocks of the kernels for TPU and GPU.
ROW_MULTIPLE = 128


def attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: Scale,
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
    paths: dict[str, Any] = {"cpu": blockwise_attention}
    if _suits_splash(q):
        # Its import takes longer than that of this package, and float32, which CPUs compute in, has no use for it.
        from qwen2_jax.attention.tpu import splash_attention

        paths["tpu"] = splash_attention
    if tiles := kernel_tiles(q, softcap):
        from qwen2_jax.attention.gpu import triton_attention

        paths["cuda"] = partial(triton_attention, tiles=tiles)
    paths["default"] = dense_attention
    # Chosen when lowering, not from the default backend: a CPU host also compiles ahead of time for TPUs.
    by_platform = {platform: partial(path, scale=scale, softcap=softcap) for platform, path in paths.items()}
    return lax.platform_dependent(q, k, v, kv_start(segment_ids, window), rotary, **by_platform)


def _suits_splash(q: Float[Array, "B T K G H"]) -> bool:
    """The kernel multiplies in bfloat16, whole blocks of tokens, and names a token's place and reach in 31 bits."""
    rows, length = q.shape[:2]
    bits = (rows * length - 1).bit_length() + (length - 1).bit_length()
    return q.dtype == jnp.bfloat16 and length % ROW_MULTIPLE == 0 and bits <= 31


def kernel_tiles(q: Float[Array, "B T K G H"] | jax.ShapeDtypeStruct, softcap: float | None) -> Tiles | None:
    """How the GPU's kernel cuts its work: on the GPU of this process, or one that is not here but compiled for.

    None where `attention` takes no such kernel. Raises ModelError when the GPU's memory is too full to find out.
    """
    if q.dtype != jnp.bfloat16 or q.shape[1] % ROW_MULTIPLE:
        return None
    if _has_cuda():
        from qwen2_jax.attention.gpu_trial import usable_tiles

        return usable_tiles(q.shape[-1], softcap)
    target = jax.sharding.get_abstract_mesh().abstract_device
    return candidates(q.shape[-1])[0] if target is not None and target.platform == "gpu" else None


def _has_cuda() -> bool:
    return jax.default_backend() == "gpu" and "cuda" in jax.local_devices()[0].client.platform_version
