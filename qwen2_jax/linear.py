"""Matrix products with weights, and where they round.

Axes: B rows, T tokens, D d_model, F d_ff, N query heads, K kv heads, H head_dim, V vocab; I, O any axes of inputs and
outputs.
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
    """A product with `weight`, as `einsum` says, and `bias` added to it where the model has one."""

    def __init__(self, einsum: str, parameters: Parameters) -> None:
        self.einsum = einsum
        self.weight = parameters.require("weight")
        self.bias = parameters.get("bias")

    def __call__(self, x: Float[Array, "B T *I"], over: MeshAxes = ()) -> Float[Array, "B T *O"]:
        """Rounded once, bias included.

        over: the mesh axes over which the heads or neurons of x are split; the sum over devices comes before the bias.
        """
        bias = None if self.bias is None else self.bias[...]
        return biased_product(self.einsum, x, self.weight[...], bias, over)


class HeadsLinear(nnx.Module):
    """A product with a `weight` (N, H, D), and a `bias` (N, H) added to it where the model has one."""

    def __init__(self, parameters: Parameters) -> None:
        self.weight = parameters.require("weight")
        self.bias = parameters.get("bias")

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """Rounded once, bias included.

        One product with all dimensions of all heads side by side: by the TPU's compiler "BTD,NHD->BTNH" costs a copy of
        the heads where head_dim is 128, 2% of a step of Qwen2.5-1.5B.
        """
        *heads, d_model = self.weight.shape
        bias = None if self.bias is None else self.bias[...].reshape(-1)
        y = biased_product("BTD,OD->BTO", x, self.weight[...].reshape(-1, d_model), bias)
        return y.reshape(*x.shape[:2], *heads)


def biased_product(
    einsum: str,
    x: Float[Array, "B T *I"],
    weight: Float[Array, ...],
    bias: Float[Array, "*O"] | None = None,
    over: MeshAxes = (),
) -> Float[Array, "B T *O"]:
    """einsum(x, weight) + bias in the dtype of x, rounded once."""
    unrounded = bool(over) or bias is not None
    y = sum_over(_product(einsum, x, weight, unrounded=unrounded), over)
    return (y if bias is None else y + bias).astype(x.dtype)


def _product(
    einsum: str, x: Float[Array, "B T *I"], weight: Float[Array, ...], *, unrounded: bool
) -> Float[Array, "B T *O"]:
    """Summed in float32; in the dtype of x or (`unrounded`) in float32. weight: (O, *I).

    float32 asks for full precision: accelerators otherwise multiply it in bf16 or TF32.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    of_sum = jnp.float32 if unrounded else None

    def on_cpu(x: Array, weight: Array) -> Array:
        # XLA:CPU has bfloat16 instructions for products in float32 alone (one that rounds by itself takes twice as
        # long), and would transpose the weight to sum over two axes.
        rows, weight = x.reshape(*x.shape[:2], -1), weight.reshape(len(weight), -1)
        y = jnp.einsum("BTI,OI->BTO", rows, weight, precision=precision, preferred_element_type=jnp.float32)
        return y if unrounded else y.astype(x.dtype)

    product = partial(jnp.einsum, einsum, precision=precision, preferred_element_type=of_sum)
    return jax.lax.platform_dependent(x, weight, cpu=on_cpu, default=product)
