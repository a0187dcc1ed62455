"""The Parquet files, read by pyarrow, which shares no code with our pages."""

import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from core.base.errors import RunError
from parquet_cache.parquet import shard_file, state_pages, thrift_compact
from parquet_cache.parquet.shard_file import ShardSchema, ShardWriter

LABELS = pa.schema([("elo", pa.int64()), ("scores", pa.list_(pa.float64())), ("site", pa.string())])


def written(rows, schema: ShardSchema) -> bytes:
    """rows: of each the (L, T, D) array and the labels."""
    out = io.BytesIO()
    writer = ShardWriter(out, schema)
    for states, labels in rows:
        writer.add(list(states), np.arange(states.shape[1], dtype=np.int32), labels)
    assert writer.finish() == len(out.getvalue())
    return out.getvalue()


def states_in(column: pa.ChunkedArray, row: int) -> np.ndarray:
    """(L, T, D) of a row, by Arrow's own buffers."""
    layers = column[row].values
    n_layers, width = column.type.list_size, column.type.value_type.value_type.list_size
    return layers.flatten().flatten().to_numpy(zero_copy_only=False).reshape(n_layers, -1, width)


@settings(max_examples=40, deadline=None)
@given(
    n_layers=st.integers(1, 4),
    width=st.integers(1, 200),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    dtype=st.sampled_from(["float16", "float32"]),
    group=st.integers(1, 1 << 16),
    page=st.integers(1, 1 << 16),
)
def test_what_is_written_is_what_pyarrow_reads(n_layers, width, lengths, dtype, group, page):
    rng = np.random.default_rng(len(lengths))
    rows = [
        (rng.standard_normal((n_layers, n, width)).astype(dtype), (i if i % 3 else None, [0.5] * i, f"site {i}"))
        for i, n in enumerate(lengths)
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shard_file, "_ROW_GROUP_BYTES", group)
        patched.setattr(state_pages, "_WANTED_PAGE", page)
        data = written(rows, ShardSchema(n_layers, width, dtype, LABELS))
    file = parquet.ParquetFile(io.BytesIO(data))
    table = file.read()
    table.validate(full=True)
    assert table.num_rows == file.metadata.num_rows == len(rows)
    assert table["hidden_states"].null_count == 0
    for place, (states, labels) in enumerate(rows):
        found = states_in(table["hidden_states"], place)
        assert found.dtype == states.dtype
        np.testing.assert_array_equal(found, states)
        assert tuple(table[name][place].as_py() for name in LABELS.names) == labels
        assert table["input_ids"][place].as_py() == list(range(states.shape[1]))


def test_every_row_group_can_be_read_alone(monkeypatch):
    monkeypatch.setattr(shard_file, "_ROW_GROUP_BYTES", 1)
    rows = [(np.full((2, 3, 5), i, np.float32), (i, None, None)) for i in range(20)]
    file = parquet.ParquetFile(io.BytesIO(written(rows, ShardSchema(2, 5, "float32", LABELS))))
    assert file.num_row_groups == 20
    group = file.read_row_group(17)
    np.testing.assert_array_equal(states_in(group["hidden_states"], 0), rows[17][0])
    assert group["elo"].to_pylist() == [17]


def test_a_label_of_another_type_is_refused():
    with pytest.raises(RunError, match="--ds_label_columns elo: "):
        written([(np.zeros((1, 1, 2), np.float16), ("text", None, None))], ShardSchema(1, 2, "float16", LABELS))


def test_a_footer_survives_decoding_and_encoding():
    out = io.BytesIO()
    parquet.write_table(pa.table({"a": [1, 2] * 50, "b": ["x", None] * 50, "c": [True, False] * 50}), out)
    data = out.getvalue()
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") : -8]
    assert thrift_compact.encode_struct(thrift_compact.decode_struct(footer)) == footer
