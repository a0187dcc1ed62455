"""Rows of a shard that is read whole, by its format's own reader.

So are pickles: they have no table of contents, and gzip no places to begin at.
"""

from typing import BinaryIO, cast

import numpy as np
from jaxtyping import Int32, Shaped

from core.reading.files.base import ExpectedRows
from core.reading.files.byte_ranges import ByteRanges, as_stream
from core.reduce.reductions import VALUES
from core.shards.formats import read_shard


class WholeRows:
    """See `RowFile`. Holds every layer of the file in memory."""

    def __init__(self, format_name: str, ranges: ByteRanges, expected: ExpectedRows) -> None:
        shard = read_shard(cast(BinaryIO, as_stream(ranges)), format_name, gzipped=expected.gzipped)
        arrays = {VALUES: shard.layers} | shard.more
        if arrays.keys() != expected.arrays.keys() or any(
            layers.keys() != set(expected.layers) for layers in arrays.values()
        ):
            raise ValueError("its layers and arrays are not those of its record")
        lengths = [len(array) for array in shard.layers[expected.layers[0]]]
        self.sample_idx = np.array(shard.sample_idx, np.int64).reshape(-1)
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        expected.check_index(self.sample_idx, self.offsets)
        self._positions, self._token_ids = (_numbers(arrays) for arrays in (shard.positions, shard.token_ids))
        self._arrays = {
            (layer, name): _joined(arrays[name][layer], name, expected, lengths)
            for name in expected.arrays
            for layer in expected.layers
        }

    def rows(self, layer: int, array: str, start: int, stop: int) -> Shaped[np.ndarray, "k W"]:
        """See `RowFile`."""
        return self._arrays[layer, array][start:stop]

    def token_ids(self, start: int, stop: int) -> Int32[np.ndarray, "k"] | None:
        """See `RowFile`: those of pickles are in the sample table."""
        return None if self._token_ids is None else self._token_ids[start:stop]

    def positions(self, start: int, stop: int) -> Int32[np.ndarray, "k"] | None:
        """See `RowFile`."""
        return None if self._positions is None else self._positions[start:stop]


def _numbers(of_samples: list[np.ndarray] | None) -> Int32[np.ndarray, "N"] | None:
    return None if of_samples is None else np.concatenate(of_samples).astype(np.int32)


def _joined(of_samples: list[np.ndarray], name: str, expected: ExpectedRows, lengths: list[int]) -> np.ndarray:
    """The rows of all samples; the list is emptied, so that no layer is in memory twice."""
    for array, length in zip(of_samples, lengths, strict=True):
        expected.check_array(name, array.shape, array.dtype, length)
    joined = np.concatenate(of_samples) if of_samples else np.empty((0, expected.arrays[name].width))
    of_samples.clear()
    return joined
