"""Puts parameters on the devices a block at a time, so that the host holds a few blocks and never a parameter twice.

A parameter is allocated on its devices and then filled by updates in place (the buffer is donated). All blocks of a
parameter have one shape, so that one small program writes them all; the last one begins early and repeats some rows.
With several devices every device is handed its own part of each block: only what is held is read, and nothing is
exchanged. Where the host is the device, the blocks are written straight into the memory that the device then has.
"""

from __future__ import annotations

import mmap
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

# Threads that read ahead. Readers of local files soon wait for each other, those of remote files for the network.
LOCAL_READERS = max(1, min(4, (os.cpu_count() or 1) // 4))
REMOTE_READERS = 8
_MIN_BLOCK, _MAX_BLOCK = 1 << 20, 32 << 20
# How many blocks make the largest tensor, for each that is under way. One may be there three times: read, cast, copied.
_BLOCKS_PER_TENSOR = 4
_STORED_ITEMSIZE = 2  # what an element of the checkpoint is reckoned at

Slices = tuple[slice, ...]


class LayerArray(Protocol):
    """One layer of a parameter, or the whole of one that has no layers: (out, in) or (out,)."""

    @property
    def transposed(self) -> bool:
        """Whether some columns can be read without the others, rather than some rows."""
        ...

    def read(self, rows: slice, columns: slice | None) -> np.ndarray:
        """Part of the array, in any float type."""
        ...


@dataclass(frozen=True)
class Placement:
    """A parameter, where its values come from and where they go.

    shape: (L, out, in) or (L, out) with L layers; (out, in) or (out,) with one and `stacked` false.
    """

    shape: tuple[int, ...]
    sharding: NamedSharding | None
    layers: tuple[LayerArray, ...]
    stacked: bool


def place(placements: Mapping[str, Placement], dtype: np.dtype, *, from_network: bool = False) -> dict[str, jax.Array]:
    """The parameters in `dtype`, each in its sharding (None: default device). from_network: more reads at once."""
    readers = REMOTE_READERS if from_network else LOCAL_READERS
    limit = _block_bytes(placements.values(), readers + 1)
    writers = {name: _param_writer(placement, dtype, limit) for name, placement in placements.items()}
    tasks = [(writer, start) for writer in writers.values() for start in writer.starts]
    with ThreadPoolExecutor(readers) as pool:
        for writer, start, parts in _read_ahead(pool, readers, tasks):
            writer.write(start, parts)
    return {name: writer.result() for name, writer in writers.items()}


def _param_writer(placement: Placement, dtype: np.dtype, limit: int) -> _ParamWriter:
    device = jax.local_devices()[0] if placement.sharding is None else next(iter(placement.sharding.device_set))
    return (_HostParamWriter if device.platform == "cpu" else _DeviceParamWriter)(placement, dtype, limit)


def _block_bytes(placements: Iterable[Placement], under_way: int) -> int:
    largest = max(prod(p.shape) // (p.shape[0] if p.stacked else 1) for p in placements)
    return min(max(largest * _STORED_ITEMSIZE // (_BLOCKS_PER_TENSOR * under_way), _MIN_BLOCK), _MAX_BLOCK)


def _read_ahead(
    pool: ThreadPoolExecutor, ahead: int, tasks: Iterable[tuple[_ParamWriter, tuple[int, ...]]]
) -> Iterator[tuple[_ParamWriter, tuple[int, ...], list[np.ndarray]]]:
    waiting: deque[tuple[_ParamWriter, tuple[int, ...], Future[list[np.ndarray]]]] = deque()
    for writer, start in tasks:
        waiting.append((writer, start, pool.submit(writer.read, start)))
        if len(waiting) > ahead:
            writer, start, parts = waiting.popleft()
            yield writer, start, parts.result()
    for writer, start, parts in waiting:
        yield writer, start, parts.result()


def _device_slices(placement: Placement) -> dict[jax.Device | None, Slices]:
    """Which part each device of this process holds."""
    if placement.sharding is None:
        return {None: (slice(None),) * len(placement.shape)}
    indices = placement.sharding.addressable_devices_indices_map(placement.shape)
    return {device: index for device, index in indices.items() if index is not None}


class _ParamWriter(ABC):
    """Reads one parameter in blocks and writes them to its devices.

    Its shapes have a leading layer axis, of 1 where it is not stacked.
    """

    def __init__(self, placement: Placement, dtype: np.dtype, limit: int) -> None:
        self._placement, self._dtype = placement, dtype
        self._axis = 2 if placement.layers[0].transposed else 1  # along which the checkpoint is read in parts
        self._sizes = placement.shape[1:] if placement.stacked else placement.shape
        self._slices = {device: self._bounds(index) for device, index in _device_slices(placement).items()}
        self._local = tuple(bound.stop - bound.start for bound in next(iter(self._slices.values())))
        self._block = self._block_shape(limit)

    def _bounds(self, index: Slices) -> Slices:
        bounds = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, self._placement.shape, strict=True))
        return bounds if self._placement.stacked else (slice(0, 1), *bounds)

    def _block_shape(self, limit: int) -> tuple[int, ...]:
        """Whole layers if one stays within the limit, else a part of one."""
        # Devices that hold the same rows, or columns of the same rows, share what the host reads.
        readings = {(index[0].start, index[self._axis].start) for index in self._slices.values()}
        across = prod(size for axis, size in enumerate(self._sizes, 1) if axis != self._axis)
        line_bytes = len(readings) * across * self._dtype.itemsize
        layer_bytes = line_bytes * self._local[self._axis]
        block = list(self._local)
        block[0] = min(self._local[0], max(1, limit // layer_bytes))
        if layer_bytes > limit:
            block[self._axis] = max(1, limit // line_bytes)
        return tuple(block)

    @property
    def starts(self) -> list[tuple[int, ...]]:
        """Where the blocks begin, in each device's part of the parameter."""
        axes = [
            [min(start, size - step) for start in range(0, size, step)]
            for size, step in zip(self._local, self._block, strict=True)
        ]
        return list(product(*axes))

    def read(self, start: tuple[int, ...]) -> list[np.ndarray]:
        """The block that begins there, once for each device of this process."""
        read: dict[tuple[int, int], np.ndarray] = {}
        parts = []
        for index in self._slices.values():
            key = (index[0].start + start[0], index[self._axis].start + start[self._axis])
            if key not in read:
                read[key] = self._read_lines(*key)
            cut = list(index)
            cut[0] = cut[self._axis] = slice(None)
            parts.append(read[key][tuple(cut)])
        return parts

    def _read_lines(self, layer: int, first: int) -> np.ndarray:
        """The block's layers, and in each the block's rows (or columns) from `first` on, in full width."""
        bounds = [slice(0, size) for size in self._sizes]
        bounds[self._axis - 1] = slice(first, first + self._block[self._axis])
        rows, columns = bounds[0], bounds[1] if len(bounds) == 2 else None
        layers = self._placement.layers[layer : layer + self._block[0]]
        out = np.empty((len(layers), *(bound.stop - bound.start for bound in bounds)), self._dtype)
        for position, array in enumerate(layers):
            out[position] = array.read(rows, columns)
        return out

    @abstractmethod
    def write(self, start: tuple[int, ...], parts: list[np.ndarray]) -> None:
        """Puts what `read` gave where it belongs."""

    @abstractmethod
    def result(self) -> jax.Array:
        """The filled parameter."""

    def _unlayered(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return sizes if self._placement.stacked else sizes[1:]

    def _to_devices(self, parts: list[np.ndarray]) -> jax.Array:
        """An array of one part a device, as large as these parts make it."""
        parts = [part.reshape(self._unlayered(part.shape)) for part in parts]
        sharding = self._placement.sharding
        if sharding is None:
            return jax.device_put(parts[0])
        arrays = [jax.device_put(part, device) for part, device in zip(parts, self._slices, strict=True)]
        sizes = zip(self._placement.shape, self._unlayered(self._local), parts[0].shape, strict=True)
        shape = tuple(size // local * part for size, local, part in sizes)
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


class _DeviceParamWriter(_ParamWriter):
    """For devices with a memory of their own."""

    _array: jax.Array | None = None

    def write(self, start: tuple[int, ...], parts: list[np.ndarray]) -> None:
        if self._array is None and self._block != self._local:
            self._array = jnp.zeros(self._placement.shape, self._dtype, device=self._placement.sharding)
        if self._array is not None:
            self._array.block_until_ready()  # else blocks would pile up faster than the devices take them
        block = self._to_devices(parts)
        if self._array is None:
            self._array = block
        else:
            offsets = np.array(self._unlayered(start), np.int32)
            self._array = _block_update(self._placement.sharding)(self._array, block, offsets)

    def result(self) -> jax.Array:
        assert self._array is not None
        return self._array


class _HostParamWriter(_ParamWriter):
    """For devices that share the host's memory: JAX takes aligned arrays over as they are."""

    def __init__(self, placement: Placement, dtype: np.dtype, limit: int) -> None:
        super().__init__(placement, dtype, limit)
        self._arrays: dict[tuple[int, ...], np.ndarray] = {}

    def write(self, start: tuple[int, ...], parts: list[np.ndarray]) -> None:
        target = tuple(slice(first, first + size) for first, size in zip(start, self._block, strict=True))
        for key, part in zip(self._keys(), parts, strict=True):
            if key not in self._arrays:
                self._arrays[key] = _aligned(self._local, self._dtype)
            self._arrays[key][target] = part

    def result(self) -> jax.Array:
        return self._to_devices([self._arrays[key] for key in self._keys()])

    def _keys(self) -> list[tuple[int, ...]]:
        """Devices that hold the same part of the parameter share it."""
        return [tuple(bound.start for bound in index) for index in self._slices.values()]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array at an address that XLA takes without a copy.

    Not `np.empty`: it asks for huge pages, and a machine with fragmented memory takes seconds to find them.
    """
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype).reshape(shape)


def _update(array: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, block, [start[axis] for axis in range(array.ndim)])


@lru_cache(maxsize=64)
def _block_update(sharding: NamedSharding | None) -> Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]:
    """Writes a block into an array in place, each device into its own part."""
    if sharding is None:
        return jax.jit(_update, donate_argnums=0)
    update = jax.shard_map(
        _update,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, sharding.spec, PartitionSpec()),
        out_specs=sharding.spec,
    )
    return jax.jit(update, donate_argnums=0)
