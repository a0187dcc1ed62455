"""Bringing arrays from the devices that computed them to the host."""

from typing import Any, TypeVar

import jax
from jaxtyping import Array

_PINNED = "pinned_host"
Arrays = TypeVar("Arrays")


def begin_copies(arrays: Arrays) -> Arrays:
    """Begins to bring every array of a tree to the host, and returns at once; `numpy.asarray` of what it returns waits.

    On a GPU an array goes to pinned host memory, which the GPU writes by itself. `copy_to_host_async` goes through a
    smaller staging buffer, which the host has to empty again and again; JAX's own checkpoints take the other way for
    that reason, and mean numpy to read such memory where it lies (jax-ml/jax, pull request 22114).
    """
    return jax.tree.map(_begin_copy, arrays)


def _begin_copy(array: Array) -> Array:
    device = next(iter(array.sharding.device_set))
    if _writes_pinned_memory(device) and not _is_repeated(array):
        return jax.device_put(array, array.sharding.with_memory_kind(_PINNED))
    array.copy_to_host_async()
    return array


def _writes_pinned_memory(device: Any) -> bool:
    """Whether it is a GPU that has such memory beside it. CPU devices have it too, and no use for it."""
    return device.platform == "gpu" and _PINNED in {memory.kind for memory in device.addressable_memories()}


def _is_repeated(array: Array) -> bool:
    """Whether two devices hold the same part: `device_put` would bring both, `copy_to_host_async` brings one."""
    return any(shard.replica_id > 0 for shard in array.addressable_shards)
