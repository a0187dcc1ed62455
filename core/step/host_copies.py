"""Copies the output of a step from its devices to the host."""

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from core.step.backend import Arrays, StepOutput

_PINNED = "pinned_host"


def begin_copies(output: StepOutput) -> StepOutput:
    """Starts to copy all arrays to the host and returns at once; `numpy.asarray` of a returned array waits for it."""
    return _with_each(begin_copy, output)


def on_host(output: StepOutput) -> StepOutput:
    """The output as numpy arrays; waits until they are copied."""
    return _with_each(_copied, output)


def wait_for(arrays: Arrays) -> None:
    """Blocks until the arrays are on the host. A step's peaks or norms are there when the device is done with it."""
    for array in arrays.values():
        _copied(array)


def _with_each(change: Callable[[Any], Any], output: StepOutput) -> StepOutput:
    # Peaks and norms first: they are small, and they tell when the step is done.
    peaks, norms, losses, arrays = (
        {name: change(array) for name, array in of.items()}
        for of in (output.peaks, output.norms, output.losses, output.arrays)
    )
    return StepOutput(arrays, peaks, norms, losses)


def _copied(array: Any) -> np.ndarray:
    return np.asarray(begin_copy(array))


@singledispatch
def begin_copy(array: Any) -> Any:
    """Starts to copy an array to the host, see `begin_copies`.

    numpy arrays, and copies that have started, are returned as they are. numpy and JAX arrays follow, torch tensors are
    in `torch_models.step`. Raises TypeError for anything else.
    """
    raise TypeError(f"no array that can be copied to the host: {type(array).__name__}")


@begin_copy.register
def _(array: np.ndarray) -> np.ndarray:
    return array


@begin_copy.register
def _(array: jax.Array) -> jax.Array:
    """A GPU writes pinned host memory directly, without work of the host.

    `copy_to_host_async` uses a smaller staging buffer, which the host has to empty many times. JAX's checkpoints use
    pinned memory for that reason, and numpy is meant to read it without another copy (jax-ml/jax, pull request 22114).
    """
    if _is_pinned(array):
        return array
    device = next(iter(array.sharding.device_set))
    if _writes_pinned_memory(device) and not _is_repeated(array):
        return jax.device_put(array, array.sharding.with_memory_kind(_PINNED))
    array.copy_to_host_async()
    return array


def _is_pinned(array: Array) -> bool:
    return array.sharding.memory_kind == _PINNED


def _writes_pinned_memory(device: Any) -> bool:
    """Whether it is a GPU with pinned host memory. CPU devices report it too but need no copy."""
    return device.platform == "gpu" and _PINNED in {memory.kind for memory in device.addressable_memories()}


def _is_repeated(array: Array) -> bool:
    """Whether two devices hold the same part: `device_put` would copy both, `copy_to_host_async` copies one."""
    return any(shard.replica_id > 0 for shard in array.addressable_shards)
