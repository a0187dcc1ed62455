"""Rows of a safetensors shard: the header, then only the bytes of the rows that are asked for."""

import numpy as np
from jaxtyping import Int32, Shaped

from core.base.safetensors_file import TensorSpan, header_end, tensor_spans
from core.reading.files.base import ExpectedRows
from core.reading.files.byte_ranges import ByteRanges
from core.reduce.reductions import array_name

# The index tensors are small: widest dtypes stand first in the file, so header and index come with the first request.
_INDEX = {"sample_idx": np.int64, "sample_offsets": np.int64, "token_ids": np.int32, "positions": np.int32}


class SafetensorsRows:
    """See `RowFile`."""

    def __init__(self, ranges: ByteRanges, expected: ExpectedRows) -> None:
        self._ranges = ranges
        try:
            end = header_end(bytes(ranges.read(0, 8)))
            self._spans = tensor_spans(bytes(ranges.read(0, end)), ranges.size)
            self.sample_idx, self.offsets = (self._index(name) for name in ("sample_idx", "sample_offsets"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a readable safetensors shard: {error!r}") from error
        expected.check_index(self.sample_idx, self.offsets)
        n_rows = int(self.offsets[-1])
        for layer in expected.layers:
            for name in expected.arrays:
                span = self._span(array_name(f"layer_{layer}", name))
                expected.check_array(name, span.shape, span.dtype, n_rows)
        for name in ("token_ids", "positions"):
            if name in self._spans and self._spans[name].shape != (n_rows,):
                raise ValueError(f"{name} has shape {self._spans[name].shape} for {n_rows} rows")

    def rows(self, layer: int, array: str, start: int, stop: int) -> Shaped[np.ndarray, "k W"]:
        """See `RowFile`."""
        return self._slice(array_name(f"layer_{layer}", array), start, stop)

    def token_ids(self, start: int, stop: int) -> Int32[np.ndarray, "k"] | None:
        """See `RowFile`."""
        return self._slice("token_ids", start, stop) if "token_ids" in self._spans else None

    def positions(self, start: int, stop: int) -> Int32[np.ndarray, "k"] | None:
        """See `RowFile`."""
        return self._slice("positions", start, stop) if "positions" in self._spans else None

    def _index(self, name: str) -> np.ndarray:
        span = self._span(name)
        if len(span.shape) != 1:
            raise ValueError(f"{name} has shape {span.shape}")
        return np.array(self._slice(name, 0, span.shape[0]))

    def _span(self, name: str) -> TensorSpan:
        span = self._spans.get(name)
        if span is None or (name in _INDEX and span.dtype != _INDEX[name]):
            raise ValueError(f"{name} is missing, or of another dtype")
        return span

    def _slice(self, name: str, start: int, stop: int) -> np.ndarray:
        span = self._span(name)
        row = span.shape[1] if len(span.shape) == 2 else 1
        first = span.start + start * row * span.dtype.itemsize
        data = self._ranges.read(first, first + (stop - start) * row * span.dtype.itemsize)
        return np.frombuffer(data, np.uint8).view(span.dtype).reshape(stop - start, *span.shape[1:])
