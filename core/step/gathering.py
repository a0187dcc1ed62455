"""Gathers chosen tokens of a step's output on its device.

Axis letters: L stored layers of a site, B rows of a step, T tokens of a row, K gathered tokens of a row.
"""

from functools import lru_cache, singledispatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int32, Shaped

from core.step.backend import StepOutput
from qwen2_jax.sharding import DATA_AXIS

_ROWS = PartitionSpec(DATA_AXIS)


def gather(output: StepOutput, places: Int32[np.ndarray, "B K"] | None) -> StepOutput:
    """The tokens at these places of each row, without norms, which are no longer needed. None: the whole output.

    Returns at once if the device has a queue of its own.
    """
    if places is None:
        return output
    arrays, peaks = ({name: take_tokens(x, places) for name, x in of.items()} for of in (output.arrays, output.peaks))
    return StepOutput(arrays, peaks)


@singledispatch
def take_tokens(x: Any, places: Int32[np.ndarray, "B K"]) -> Any:
    """(L, B, T, …) to (L, B, K, …). numpy and JAX arrays follow, torch tensors are in `torch_models.step`.

    Raises TypeError for anything else.
    """
    raise TypeError(f"no array of which tokens can be taken: {type(x).__name__}")


@take_tokens.register
def _(x: np.ndarray, places: Int32[np.ndarray, "B K"]) -> np.ndarray:
    return np.take_along_axis(x, places.reshape(1, *places.shape, *[1] * (x.ndim - 3)), axis=2)


@take_tokens.register
def _(x: jax.Array, places: Int32[np.ndarray, "B K"]) -> jax.Array:
    sharding = x.sharding
    assert isinstance(sharding, NamedSharding), "a step is computed on a mesh"
    taken: jax.Array = gather_program(sharding)(x, jax.device_put(places, NamedSharding(sharding.mesh, _ROWS)))
    return taken


@lru_cache
def gather_program(sharding: NamedSharding) -> jax.stages.Wrapped:
    """(x (L, B, T, …), places (B, K)) -> (L, B, K, …), jitted, for this sharding: rows stay on their devices."""

    def of_row(x: Shaped[Array, "L T *values"], places: Int32[Array, "K"]) -> Shaped[Array, "L K *values"]:
        return jnp.take(x, places, axis=1, mode="clip")

    take, specs = jax.vmap(of_row, in_axes=(1, 0), out_axes=1), (sharding.spec, _ROWS)
    return jax.jit(jax.shard_map(take, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec, check_vma=False))
