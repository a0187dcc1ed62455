"""Matrix products with weights, and where they round.

Axes: B rows, T tokens; I, O any axes of inputs and outputs.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qwen2_jax.parameters import Parameters
from qwen2_jax.sharding import MeshAxes, sum_over


class Linear(nnx.Module):
    """A product with `weight` (out, in), as `einsum` says, and `bias` (out,) added to it where the model has one."""

    def __init__(self, einsum: str, parameters: Parameters) -> None:
        self.einsum = einsum
        self.weight = parameters.require("weight")
        self.bias = parameters.get("bias")

    def __call__(self, x: Float[Array, "B T *I"], over: MeshAxes = ()) -> Float[Array, "B T O"]:
        """Rounded once, bias included. x may come with several axes for the one that is `in`.

        over: the mesh axes over which the heads or neurons of x are split; the sum over devices comes before the bias.
        """
        weight = self.weight[...].reshape(-1, *x.shape[2:])
        unrounded = bool(over) or self.bias is not None
        y = sum_over(product(self.einsum, x, weight, unrounded=unrounded), over)
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


def product(
    einsum: str, x: Float[Array, "B T *I"], weight: Float[Array, "O *I"], *, unrounded: bool = False
) -> Float[Array, "B T O"]:
    """Summed in float32; in the dtype of x or (`unrounded`) in float32.

    float32 asks for full precision: accelerators otherwise multiply it in bf16 or TF32.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    multiply = partial(jnp.einsum, einsum, precision=precision)
    in_float32 = partial(multiply, preferred_element_type=jnp.float32)
    if unrounded:
        return in_float32(x, weight)

    def rounded(x: Array, weight: Array) -> Array:
        return in_float32(x, weight).astype(x.dtype)

    # XLA:CPU has bfloat16 instructions for products in float32 alone: one that rounds by itself takes twice as long.
    return jax.lax.platform_dependent(x, weight, cpu=rounded, default=multiply)
