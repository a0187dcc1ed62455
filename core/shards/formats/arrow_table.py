"""Shards as Arrow tables, for the formats parquet and arrow: a row for each sample, a column for each layer.

Columns: `sample_idx` int64, `n_rows` int32; `{site}_layer_{i}`, lists of (K, D) in the stored dtype; `token_ids` lists
of int32, and where tokens are left out `positions`; `text_preview` and `labels` (JSON) as strings. Reduced activations
have `{site}_layer_{i}_indices` and `{site}_layer_{i}_scale` besides; where rows are pools there are no token ids.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped

from core.base.dtypes import ARRAY_DTYPES
from core.reduce.reductions import VALUES
from core.samples.windows import TokenizedSample
from core.shards.formats.arrow_columns import (
    ArrayColumn,
    column_name,
    nested_lists,
    number_lists,
    parse_column,
    read_nested,
    read_numbers,
    table_schema,
)
from core.shards.formats.base import ShardContent, StoredShard

GROUP_BYTES = 64 << 20
"""Samples of so many bytes of values, of all layers together, are written and read at once; at least one."""


def array_columns(content: ShardContent) -> list[tuple[ArrayColumn, Shaped[np.ndarray, "N W"]]]:
    """The columns of arrays of a shard, each with the rows of all samples."""
    return [
        (ArrayColumn(column_name(content.site, layer, name), array.dtype.name, array.shape[2]), array[slot])
        for slot, layer in enumerate(content.layers)
        for name, array in content.arrays.items()
    ]


def shard_schema(content: ShardContent) -> Any:
    """The schema of a shard."""
    more = {"sample_idx": "int64", "n_rows": "int32", "text_preview": "string", "labels": "string"}
    more |= {} if content.token_ids is None else {"token_ids": "[int32]"}
    more |= {} if content.positions is None else {"positions": "[int32]"}
    return table_schema([column for column, _ in array_columns(content)], more)


def shard_batches(content: ShardContent, schema: Any) -> Iterator[Any]:
    """Record batches of a shard, each of samples of `GROUP_BYTES`; values are not copied."""
    import pyarrow

    arrays = array_columns(content)
    token_ids, positions = content.token_ids, content.positions
    for first, last in sample_groups(content.offsets, sum(rows.itemsize * rows.shape[1] for _, rows in arrays)):
        samples = content.samples[first:last]
        lengths = np.diff(content.offsets[first : last + 1])
        columns = sample_columns(samples, lengths)
        if token_ids is not None:
            columns["token_ids"] = number_lists(token_ids[first:last])
        if positions is not None:
            columns["positions"] = number_lists(positions[first:last])
        rows = slice(content.offsets[first], content.offsets[last])
        columns |= {column.name: nested_lists(values[rows], lengths) for column, values in arrays}
        yield pyarrow.record_batch([columns[name] for name in schema.names], schema=schema)


def sample_columns(samples: Sequence[TokenizedSample], lengths: Shaped[np.ndarray, "S"]) -> dict[str, Any]:
    """The columns that describe samples, beside their tokens."""
    import pyarrow

    labels = [json.dumps(sample.labels, sort_keys=True, ensure_ascii=False) for sample in samples]
    return {
        "sample_idx": pyarrow.array([sample.sample_idx for sample in samples], pyarrow.int64()),
        "n_rows": pyarrow.array(lengths.astype(np.int32)),
        "text_preview": pyarrow.array([sample.text_preview for sample in samples], pyarrow.string()),
        "labels": pyarrow.array(labels, pyarrow.string()),
    }


def sample_groups(offsets: Shaped[np.ndarray, "S_plus_1"], row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cuts samples into runs (first, last + 1) of at most `GROUP_BYTES`, or of one sample."""
    first, n_samples = 0, len(offsets) - 1
    while first < n_samples:
        most_rows = offsets[first] + GROUP_BYTES // row_bytes
        last = max(first + 1, int(np.searchsorted(offsets, most_rows, side="right")) - 1)
        yield first, last
        first = last


def stored_shard(schema: Any, batches: Iterable[Any]) -> StoredShard:
    """The shard in these batches. Raises ValueError, KeyError, TypeError or AttributeError for another table."""
    arrays = {field.name: ArrayColumn.of(field) for field in schema if parse_column(field.name)}
    samples: list[int] = []
    more: dict[str, dict[int, list[np.ndarray]]] = {VALUES: {}}
    numbers: dict[str, list[np.ndarray]] = {name: [] for name in ("token_ids", "positions") if name in schema.names}
    for batch in batches:
        lengths = batch.column("n_rows").to_pylist()
        samples += batch.column("sample_idx").to_pylist()
        for name, found in numbers.items():
            found += _cut(*read_numbers(batch.column(name)), lengths, name)
        for name, column in arrays.items():
            layer, array = parse_column(name) or (0, "")
            rows = _cut(*read_nested(batch.column(name), ARRAY_DTYPES[column.dtype], column.width), lengths, name)
            more.setdefault(array, {}).setdefault(layer, []).extend(rows)
    if not all(type(index) is int for index in samples):
        raise ValueError("a sample has no number")
    named = dict(sorted(more.items()))
    return StoredShard(tuple(samples), named.pop(VALUES), numbers.get("positions"), numbers.get("token_ids"), named)


def _cut(
    rows: Shaped[np.ndarray, "N *_"], offsets: Int64[np.ndarray, "S_plus_1"], lengths: list[int], name: str
) -> list[Shaped[np.ndarray, "K *_"]]:
    if np.diff(offsets).tolist() != lengths:
        raise ValueError(f"{name} has other numbers of rows than n_rows")
    return [rows[start:stop] for start, stop in pairwise(offsets.tolist())]
