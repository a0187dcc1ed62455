"""Parameters to place whose every read is written down, for `test_placement` and the devices it starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from qwen2_jax.checkpoints import placement
from qwen2_jax.checkpoints.placement import Placement


@dataclass
class Layer:
    """A `LayerArray` over an array. reads: the parts that were asked for."""

    array: np.ndarray
    transposed: bool = False
    reads: list[tuple[slice, slice | None]] = field(default_factory=list)

    def read(self, rows: slice, columns: slice | None) -> np.ndarray:
        self.reads.append((rows, columns))
        return self.array[rows] if columns is None else self.array[rows, columns]

    def times_read(self) -> np.ndarray:
        """How often each element was read."""
        times = np.zeros(self.array.shape, int)
        for rows, columns in self.reads:
            times[rows if columns is None else (rows, columns)] += 1
        return times


def parameter(shape: tuple[int, ...], *, stacked: bool, transposed: bool = False, sharding=None, seed=0) -> Placement:
    """Random values, of which no two are alike."""
    values = np.random.default_rng(seed).permutation(int(np.prod(shape))).reshape(shape).astype(np.float32)
    layers = tuple(Layer(layer, transposed) for layer in (values if stacked else values[None]))
    return Placement(shape, sharding, layers, stacked)


def values_of(placement: Placement) -> np.ndarray:
    """What has to arrive."""
    return np.stack([layer.array for layer in placement.layers]).reshape(placement.shape)


@contextmanager
def filled_by(kind: str, block_bytes: int) -> Iterator[None]:
    """Fills parameters on the devices or on the host, whatever the devices are, in blocks of this size."""
    before = placement._param_writer, placement._block_bytes
    cls = {"device": placement._DeviceParamWriter, "host": placement._HostParamWriter}[kind]
    placement._param_writer, placement._block_bytes = cls, lambda *_: block_bytes
    try:
        yield
    finally:
        placement._param_writer, placement._block_bytes = before
