"""The layers of a decoder in one `jax.lax.scan`, whichever of them are captured.

Axes: L captured layers, B rows, T tokens, D d_model, W width of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qwen2_jax.block import Block, LayerContext
from qwen2_jax.taps import BEFORE_MLP

# What becomes of a captured tap: (site, tap) -> any tree of arrays.
Keep = Callable[[str, Float[Array, "B T W"]], Any]
LayerNumber = int | Int[Array, ""]
Contexts = Callable[[LayerNumber], LayerContext]
# Residual stream and layer number -> residual stream after the layer, and site -> what `Keep` made of it.
_RunLayer = Callable[[Float[Array, "B T D"], LayerNumber], tuple[Float[Array, "B T D"], dict[str, Any]]]
_Carry = TypeVar("_Carry")


def run_layers(
    layers: Block,
    x: Float[Array, "B T D"],
    contexts: Contexts,
    n_run: int,
    captured: tuple[int, ...],
    sites: Sequence[str],
    keep: Keep,
) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
    """Runs layers 0 to n_run - 1. Returns the residual stream, and site -> what `keep` made of it, (L, …).

    layers: with parameters stacked along a leading layer axis. contexts: layer number -> what the layer is given.
    captured: ascending, below n_run.
    """
    graph, stacked = nnx.split(layers)

    def run(x: Array, layer: LayerNumber) -> tuple[Array, dict[str, Any]]:
        # Indexed here, never sliced for a scan: a slice may be a copy of the weights.
        weights = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, layer, keepdims=False), stacked)
        x, taps = nnx.merge(graph, weights)(x, contexts(layer))
        return x, {site: keep(site, taps[site]) for site in sites}

    if not captured:
        return _pass(run, x, range(n_run)), {}
    x, outputs = _capture(run, x, captured, skips_mlp=BEFORE_MLP.issuperset(sites))
    return _pass(run, x, range(captured[-1] + 1, n_run)), outputs


def _pass(run: _RunLayer, x: Float[Array, "B T D"], layers: range) -> Float[Array, "B T D"]:
    return _scan(lambda x, layer: run(x, layer)[0], x, layers)


def _capture(
    run: _RunLayer, x: Float[Array, "B T D"], captured: tuple[int, ...], *, skips_mlp: bool
) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
    """Up to the last captured layer.

    That layer stands after the scan where it is the only one, so that the others store nothing, or where its MLP is
    skipped: what nobody reads is dead code to the compiler there.
    """
    last, of_last = captured[-1], len(captured) - 1
    if not of_last:
        x, outputs = run(_pass(run, x, range(last)), last)
        return x, jax.tree.map(lambda array: array[None], outputs)
    buffers = jax.tree.map(partial(_slots, len(captured)), jax.eval_shape(run, x, jnp.int32(0))[1])
    # A layer that is not captured writes to the slot of the next that is, which writes over it. A branch costs more.
    slots = jnp.asarray(np.searchsorted(captured, np.arange(last + 1)), jnp.int32)

    def step(carry: tuple[Array, Any], layer: Array) -> tuple[Array, Any]:
        x, buffers = carry
        x, outputs = run(x, layer)
        return x, _put(outputs, buffers, slots[layer])

    x, buffers = _scan(step, (x, buffers), range(last if skips_mlp else last + 1))
    if skips_mlp:
        x, outputs = run(x, last)
        buffers = _put(outputs, buffers, of_last)
    return x, buffers


def _scan(step: Callable[[_Carry, Array], _Carry], carry: _Carry, layers: range) -> _Carry:
    if not layers:
        return carry
    numbers = jnp.arange(layers.start, layers.stop, dtype=jnp.int32)
    return jax.lax.scan(lambda carry, layer: (step(carry, layer), None), carry, numbers)[0]


def _slots(n: int, output: jax.ShapeDtypeStruct) -> Array:
    """Room for n such arrays, not filled: every slot is written."""
    return jax.lax.empty((n, *output.shape), output.dtype)


def _put(arrays: Any, stacked: Any, slot: LayerNumber) -> Any:
    """`stacked` with `arrays` at `slot` of its leading axis; in place where the compiler may."""
    return jax.tree.map(lambda new, old: jax.lax.dynamic_update_index_in_dim(old, new, slot, 0), arrays, stacked)
