"""The norms of `DecoderConfig.norm`. All normalise in float32; they differ in where they round.

Axes: B rows, T tokens, D the normalised one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from qwen2_jax.config import NormKind
from qwen2_jax.parameters import Parameters
from qwen2_jax.sharding import MeshAxes


class Norm(nnx.Module):
    """weight (D,), and for LayerNorm bias (D,)."""

    def __init__(self, kind: NormKind, eps: float, parameters: Parameters) -> None:
        self.kind, self.eps = kind, eps
        self.weight = parameters.require("weight")
        self.bias = parameters.get("bias")

    def __call__(self, x: Float[Array, "B T *heads D"], over: MeshAxes = ()) -> Float[Array, "B T *heads D"]:
        """over: the mesh axes over which D is split, for the RMS norms."""
        weight = self.weight[...]
        match self.kind:
            case "rms":
                return rms_norm(x, weight, self.eps, over)
            case "rms_f32":
                return (weight * _rms_normalised(x, self.eps, over)).astype(x.dtype)
            case "rms_plus_one":
                return ((1 + weight.astype(jnp.float32)) * _rms_normalised(x, self.eps, over)).astype(x.dtype)
            case "layer":
                assert self.bias is not None
                return layer_norm(x, weight, self.bias[...], self.eps)


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float, over: MeshAxes = ()
) -> Float[Array, "*B D"]:
    """Normalised in float32, cast, then weighted: transformers' order for Llama, which bf16 parity depends on."""
    return weight * _rms_normalised(x, eps, over).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """LayerNorm in float32, rounded once."""
    x32 = x.astype(jnp.float32)
    x32 -= jnp.mean(x32, axis=-1, keepdims=True)
    return (_rms_normalised(x32, eps) * weight + bias).astype(x.dtype)


def _rms_normalised(x: Float[Array, "*B D"], eps: float, over: MeshAxes = ()) -> Float32[Array, "*B D"]:
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return x32 * jax.lax.rsqrt((jax.lax.pmean(mean, over) if over else mean) + eps)
