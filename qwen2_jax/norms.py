"""The norms of `DecoderConfig.norm`. All normalise in float32; they differ in where they round.

Axes: B rows, T tokens, D the normalised one.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qwen2_jax.config import DecoderConfig
from qwen2_jax.sharding import MeshAxes


def norm(
    x: Float[Array, "B T *heads D"],
    weights: Mapping[str, Array],
    name: str,
    config: DecoderConfig,
    over: MeshAxes = (),
) -> Float[Array, "B T *heads D"]:
    """The norm whose weight, and bias where it has one, are called `name` and `name`_bias.

    over: the mesh axes over which D is split, for the RMS norms.
    """
    weight, eps = weights[name], config.norm_eps
    match config.norm:
        case "rms":
            return rms_norm(x, weight, eps, over)
        case "rms_f32":
            return (weight * _rms_normalised(x, eps, over)).astype(x.dtype)
        case "rms_plus_one":
            return ((1 + weight.astype(jnp.float32)) * _rms_normalised(x, eps, over)).astype(x.dtype)
        case "layer":
            return layer_norm(x, weight, weights[f"{name}_bias"], eps)


def rms_norm(
    x: Float[Array, "B T *heads D"], weight: Float[Array, " D"], eps: float, over: MeshAxes = ()
) -> Float[Array, "B T *heads D"]:
    """Normalised in float32, cast, then weighted: transformers' order for Llama, which bf16 parity depends on."""
    return weight * _rms_normalised(x, eps, over).astype(x.dtype)


def layer_norm(
    x: Float[Array, "B T D"], weight: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "B T D"]:
    """LayerNorm in float32, rounded once."""
    x32 = x.astype(jnp.float32)
    x32 -= jnp.mean(x32, axis=-1, keepdims=True)
    return (_rms_normalised(x32, eps) * weight + bias).astype(x.dtype)


def _rms_normalised(x: Float[Array, "*B D"], eps: float, over: MeshAxes = ()) -> Float[Array, "*B D"]:
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return x32 * jax.lax.rsqrt((jax.lax.pmean(mean, over) if over else mean) + eps)
