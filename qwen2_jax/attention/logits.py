"""What all implementations of attention share: which keys a query sees, and its logits.

Axes: B rows, T query tokens, S key tokens; R is any axis of queries.

What a query sees is always one run of the row: from the first token of its own segment (or of its window, whichever is
later) to itself. All implementations work from that first index alone; segment ids are not looked at again.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

# Finite, so that a fully masked block is rescaled to 0 instead of NaN.
MASK_VALUE = -1e30

# Traced where it goes by the layer; a float where a kernel may build it in.
Scale = float | Float[Array, ""]


def kv_start(segment_ids: Int[Array, "B T"], window: Int[Array, ""] | None = None) -> Int[Array, "B T"]:
    """The row index of the first key that each query sees; the last is always the query itself. Padding sees itself."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    starts = segment_ids != jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    start = lax.cummax(jnp.where(starts, index, 0), axis=1)
    if window is not None:
        start = jnp.maximum(start, index - window + 1)
    return jnp.where(segment_ids == 0, index, start)


def scaled_logits(dots: Float32[Array, "*R S"], scale: Scale, softcap: float | None) -> Float32[Array, "*R S"]:
    """scale · dots, bent to softcap · tanh(logits / softcap) where there is a cap."""
    logits = dots * scale
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def masked_logits(
    logits: Float32[Array, "*B R S"], start: Int[Array, "*B R"], query: Int[Array, " R"], key: Int[Array, " S"]
) -> Float32[Array, "*B R S"]:
    """start: what `kv_start` gives of each query; query, key: row indices."""
    visible = (start[..., :, None] <= key) & (key <= query[:, None])
    return jnp.where(visible, logits, MASK_VALUE)


def einsum_f32(subscripts: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float32[Array, "..."]:
    """Accumulates in float32. float32 asks for full precision: accelerators otherwise multiply it in bf16 or TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)
