"""Bringing what a step gives from the devices that computed it to the host."""

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from core.step.backend import Arrays, StepOutput

_PINNED = "pinned_host"


def begin_copies(output: StepOutput) -> StepOutput:
    """Begins to bring all arrays to the host, and returns at once; `numpy.asarray` of what it returns waits."""
    return _with_each(begin_copy, output)


def on_host(output: StepOutput) -> StepOutput:
    """The arrays as numpy's, once they have arrived."""
    return _with_each(_arrived, output)


def wait_for(arrays: Arrays) -> None:
    """Blocks until they are on the host. Of a step's peaks or norms: until the device is done with the step."""
    for array in arrays.values():
        _arrived(array)


def _with_each(change: Callable[[Any], Any], output: StepOutput) -> StepOutput:
    # The little that says whether the step is done and sound goes first.
    peaks, norms, losses, arrays = (
        {name: change(array) for name, array in of.items()}
        for of in (output.peaks, output.norms, output.losses, output.arrays)
    )
    return StepOutput(arrays, peaks, norms, losses)


def _arrived(array: Any) -> np.ndarray:
    return np.asarray(begin_copy(array))


@singledispatch
def begin_copy(array: Any) -> Any:
    """Begins to bring an array to the host, see `begin_copies`.

    numpy's are there, and so is what is under way. Those of JAX below, torch's in `torch_models.step`.
    """
    return array


@begin_copy.register
def _(array: jax.Array) -> jax.Array:
    """On a GPU an array goes to pinned host memory, which the GPU writes by itself.

    `copy_to_host_async` goes through a smaller staging buffer, which the host has to empty again and again; JAX's own
    checkpoints take the other way for that reason, and mean numpy to read such memory where it lies (jax-ml/jax, pull
    request 22114).
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
    """Whether it is a GPU that has such memory beside it. CPU devices have it too, and no use for it."""
    return device.platform == "gpu" and _PINNED in {memory.kind for memory in device.addressable_memories()}


def _is_repeated(array: Array) -> bool:
    """Whether two devices hold the same part: `device_put` would bring both, `copy_to_host_async` brings one."""
    return any(shard.replica_id > 0 for shard in array.addressable_shards)
