"""Rows of parquet and arrow shards: a group of samples of one column is read and decoded at once.

Axis letters: S samples, k rows of a range, W values of a row.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, Shaped

from core.base.dtypes import ARRAY_DTYPES
from core.reading.files.base import ExpectedRows
from core.reading.files.byte_ranges import ByteRanges
from core.reading.files.table_columns import ArrowColumns, ParquetColumns, TableColumns
from core.shards.formats.arrow_columns import ArrayColumn, column_name, read_nested, read_numbers

Decode = Callable[[Any], tuple[Shaped[np.ndarray, "N *_"], Int64[np.ndarray, "S_plus_1"]]]


class TableRows:
    """See `RowFile`. Holds the last group of each column that was decoded."""

    def __init__(self, columns: TableColumns, expected: ExpectedRows) -> None:
        self._columns, self._expected = columns, expected
        self._decoded: dict[str, tuple[int, np.ndarray]] = {}
        self._lock = threading.Lock()
        names = {column_name(expected.site, layer, name): name for layer in expected.layers for name in expected.arrays}
        missing = {"sample_idx", "n_rows", *names} - set(columns.schema.names)
        if missing:
            raise ValueError(f"it has no column {min(missing)}")
        groups = [self._numbers(group) for group in range(columns.n_groups)]
        self.sample_idx = np.concatenate([np.empty(0, np.int64), *(numbers for numbers, _ in groups)])
        self._lengths = [lengths for _, lengths in groups]
        self.offsets = np.cumsum(np.concatenate([[0], *self._lengths]), dtype=np.int64)
        self._group_rows = np.cumsum([0, *(int(lengths.sum()) for lengths in self._lengths)])
        expected.check_index(self.sample_idx, self.offsets)
        for column, name in names.items():
            found = ArrayColumn.of(columns.schema.field(column))
            shape = int(self.offsets[-1]), found.width
            expected.check_array(name, shape, ARRAY_DTYPES[found.dtype], shape[0])

    def rows(self, layer: int, array: str, start: int, stop: int) -> Shaped[np.ndarray, "k W"]:
        """See `RowFile`."""
        wanted = self._expected.arrays[array]
        decode = partial(read_nested, dtype=wanted.dtype, width=wanted.width)
        empty = np.empty((0, wanted.width), wanted.dtype)
        return self._range(column_name(self._expected.site, layer, array), decode, empty, start, stop)

    def token_ids(self, start: int, stop: int) -> Int32[np.ndarray, "k"] | None:
        """See `RowFile`."""
        return self._optional("token_ids", start, stop)

    def positions(self, start: int, stop: int) -> Int32[np.ndarray, "k"] | None:
        """See `RowFile`."""
        return self._optional("positions", start, stop)

    def _optional(self, name: str, start: int, stop: int) -> Int32[np.ndarray, "k"] | None:
        if name not in self._columns.schema.names:
            return None
        return self._range(name, read_numbers, np.empty(0, np.int32), start, stop)

    def _numbers(self, group: int) -> tuple[Int64[np.ndarray, "S"], Int64[np.ndarray, "S"]]:
        """Number and rows of each sample of a group."""
        found = [self._columns.column(group, name) for name in ("sample_idx", "n_rows")]
        if any(column.null_count for column in found):
            raise ValueError("a sample has no number")
        sample_idx, n_rows = (column.to_numpy(zero_copy_only=False).astype(np.int64) for column in found)
        return sample_idx, n_rows

    def _range(self, name: str, decode: Decode, empty: np.ndarray, start: int, stop: int) -> np.ndarray:
        first = int(np.searchsorted(self._group_rows, start, side="right")) - 1
        pieces = []
        for group in range(max(first, 0), len(self._lengths)):
            begin, end = self._group_rows[group : group + 2].tolist()
            if begin >= stop:
                break
            if max(begin, start) < min(end, stop):
                rows = self._group(name, group, decode)
                pieces.append(rows[max(begin, start) - begin : min(end, stop) - begin])
        return pieces[0] if len(pieces) == 1 else np.concatenate([empty, *pieces])

    def _group(self, name: str, group: int, decode: Decode) -> np.ndarray:
        with self._lock:
            held = self._decoded.get(name)
            if held is None or held[0] != group:
                rows, offsets = decode(self._columns.column(group, name))
                if not np.array_equal(np.diff(offsets), self._lengths[group]):
                    raise ValueError(f"{name} has other numbers of rows than n_rows")
                self._decoded[name] = held = group, rows
            return held[1]


def parquet_rows(ranges: ByteRanges, expected: ExpectedRows) -> TableRows:
    """A parquet shard, see `RowFile`."""
    return _table(ParquetColumns, ranges, expected)


def arrow_rows(ranges: ByteRanges, expected: ExpectedRows) -> TableRows:
    """An arrow shard, see `RowFile`."""
    return _table(ArrowColumns, ranges, expected)


def _table(kind: Callable[[ByteRanges], TableColumns], ranges: ByteRanges, expected: ExpectedRows) -> TableRows:
    try:
        return TableRows(kind(ranges), expected)
    except (NotImplementedError, AttributeError, MemoryError) as error:
        raise ValueError(f"not a readable table: {error!r}") from error
