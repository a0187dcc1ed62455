"""npz, parquet and arrow shards: read by numpy and datasets alone, and refused where they were made to do harm."""

import io
import json
import os
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import content, selected, written

from core.shards.formats import FORMATS, parquet_footer, read_shard
from core.shards.formats.arrow_table import shard_batches, shard_schema

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
TABLES = ("parquet", "arrow")


def refused(fmt: str, data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_shard(io.BytesIO(data), fmt, gzipped=False)


def test_numpy_alone_reads_an_npz(tmp_path):
    shard = selected([3, 4])
    (tmp_path / "s.npz").write_bytes(written("npz", shard))
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:
        assert set(file.files) == {"layer_0", "layer_7", "token_ids", "positions", "sample_idx", "sample_offsets"}
        start, stop = file["sample_offsets"][1:3]
        np.testing.assert_array_equal(file["layer_7"][start:stop], shard.rows("activation", 1, 1))
        np.testing.assert_array_equal(file["positions"][start:stop], shard.samples[1].stored_places)


def test_an_npz_has_no_time():
    with zipfile.ZipFile(io.BytesIO(written("npz", content([3, 4])))) as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("fmt", TABLES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_datasets_loads_a_table_as_arrays(tmp_path, fmt, dtype):
    datasets = pytest.importorskip("datasets")
    shard = selected([3, 1, 4], dtype=dtype)
    (tmp_path / f"s.{fmt}").write_bytes(written(fmt, shard))
    found = datasets.load_dataset(
        fmt, data_files=str(tmp_path / f"s.{fmt}"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert found.features["residual_layer_7"].shape == (None, 5)
    arrays = found.select_columns(["residual_layer_7"]).with_format("numpy", dtype=np.dtype(dtype))
    for place, (row, array) in enumerate(zip(found, arrays, strict=True)):
        assert array["residual_layer_7"].dtype == dtype
        np.testing.assert_array_equal(array["residual_layer_7"], shard.rows("activation", 1, place))
        assert row["token_ids"] == shard.token_ids[place].tolist()
        assert row["positions"] == shard.positions[place].tolist()
        assert row["sample_idx"] == 10 + place
        assert row["text_preview"] == f"préview {place}"
        assert json.loads(row["labels"]) == {"label": place}


def test_one_layer_of_a_parquet_shard_is_read_without_the_others(tmp_path):
    data = bytearray(written("parquet", content([3, 4])))
    group = parquet.ParquetFile(io.BytesIO(bytes(data))).metadata.row_group(0)
    columns = {group.column(i).path_in_schema.partition(".")[0]: group.column(i) for i in range(group.num_columns)}
    other = columns["residual_layer_0"]
    data[other.data_page_offset : other.data_page_offset + other.total_compressed_size] = bytes(
        other.total_compressed_size
    )
    found = parquet.read_table(io.BytesIO(bytes(data)), columns=["residual_layer_7"], use_threads=False)
    assert np.concatenate(found["residual_layer_7"].to_pylist()).tolist() == content([3, 4]).values[1].tolist()
    refused("parquet", bytes(data), "not a readable parquet shard")


def test_the_version_of_pyarrow_is_not_stored():
    data = written("parquet", content([3, 4]))
    assert parquet.read_metadata(io.BytesIO(data)).created_by == "qwen2-jax-activations version 1"
    assert pyarrow.__version__.encode() not in data
    assert b"parquet-cpp" not in data


@pytest.mark.parametrize("fmt", TABLES)
def test_many_samples_are_cut_into_groups_of_a_few(monkeypatch, fmt):
    monkeypatch.setattr("core.shards.formats.arrow_table.GROUP_BYTES", 200)  # a row of both layers takes 20
    shard = content([3, 8, 1, 2, 15, 4])
    assert [batch.num_rows for batch in shard_batches(shard, shard_schema(shard))] == [1, 2, 1, 1, 1]
    assert read_shard(io.BytesIO(written(fmt, shard)), fmt, gzipped=False).outline() == shard.outline()


@pytest.mark.parametrize("fmt", ["npz", *TABLES])
@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_changes_values_alone(fmt, place, bit):
    shard = content([3, 4])
    data = bytearray(written(fmt, shard))
    data[place % len(data)] ^= 1 << bit
    try:
        found = read_shard(io.BytesIO(bytes(data)), fmt, gzipped=False)
    except ValueError:
        return
    assert all(isinstance(array, np.ndarray) for arrays in found.layers.values() for array in arrays)


def npy(declared: str, data: bytes = b"") -> bytes:
    head = declared.encode() + b" " * (63 - (10 + len(declared)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return whole.getvalue()


def test_an_npz_cannot_allocate_what_it_does_not_have_or_run_code():
    with zipfile.ZipFile(io.BytesIO(written("npz", content([3, 4])))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    refused("npz", zipped(members, zipfile.ZIP_DEFLATED), "is compressed")
    huge = npy("{'descr': '<f2', 'fortran_order': False, 'shape': (7, 500000000000), }", bytes(70))
    refused("npz", zipped(members | {"layer_7.npy": huge}), "it has 70 bytes for float16")
    negative = npy("{'descr': '<f2', 'fortran_order': False, 'shape': (-7, -5), }", bytes(70))
    refused("npz", zipped(members | {"layer_7.npy": negative}), "of shape")
    pickled = io.BytesIO()
    np.save(pickled, np.array([print], object), allow_pickle=True)
    refused("npz", zipped(members | {"layer_7.npy": pickled.getvalue()}), "its values are object")
    refused(
        "npz",
        zipped(members | {"more.npy": npy("{'descr': '<f2', 'fortran_order': False, 'shape': (0,), }")}),
        "more.npy",
    )
    del members["sample_idx.npy"]
    refused("npz", zipped(members), "sample_idx")


def table_of(fmt: str) -> "pyarrow.Table":
    shard = content([3, 4])
    schema = shard_schema(shard)
    return pyarrow.Table.from_batches(list(shard_batches(shard, schema)), schema=schema)


def test_a_parquet_file_that_expands_beyond_measure_is_refused(monkeypatch):
    def stored(table, **options) -> bytes:
        written = io.BytesIO()
        parquet.write_table(table, written, **options)
        return written.getvalue()

    table = table_of("parquet")
    refused("parquet", stored(table, use_dictionary=True), "is encoded as .*DICTIONARY")
    monkeypatch.setattr("core.shards.formats.parquet_shard._ALWAYS_ALLOWED", 1 << 20)
    bomb = pyarrow.table({"a": pyarrow.array([bytes(4 << 20)], pyarrow.binary())})
    data = stored(bomb, compression="zstd", use_dictionary=False, write_statistics=False)
    assert len(data) < 8192
    refused("parquet", data, "bytes would expand to 4194")


@pytest.mark.parametrize("place", [0, 1])
def test_a_footer_that_would_end_the_process_is_refused(place):
    """Lists of another length than the levels of a column: pyarrow 26 aborts in `RowGroupMetaData.column`."""
    histogram = {2: [0, 0, 0], 3: [0, 0, 0, 0, 0, 0]}
    fields = {2: [0, 3], 3: [b"a", b"list", b"element", b"list", b"element"], 5: 1, 6: 1, 7: 1, 16: histogram}
    assert parquet_footer._chunk(fields).path == "a.list.element.list.element"
    histogram[2 + place] = [0]
    with pytest.raises(ValueError, match="has histograms of other levels"):
        parquet_footer._chunk(fields)


def test_the_footer_says_what_pyarrow_says():
    data = written("parquet", selected([3, 1, 4]))
    group = parquet.read_metadata(io.BytesIO(data)).row_group(0)
    chunks = parquet_footer.read_chunks(io.BytesIO(data))
    assert len(chunks) == group.num_columns
    for chunk, column in zip(chunks, map(group.column, range(group.num_columns)), strict=True):
        assert chunk.path == column.path_in_schema
        assert set(chunk.encodings) == set(column.encodings)
        assert (chunk.n_values, chunk.compressed, chunk.uncompressed) == (
            column.num_values,
            column.total_compressed_size,
            column.total_uncompressed_size,
        )


def test_an_arrow_file_that_is_compressed_or_shares_its_bytes_is_refused():
    table, written = table_of("arrow"), io.BytesIO()
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_file(written, table.schema, options=options) as writer:
        writer.write_table(table)
    refused("arrow", written.getvalue(), "it is compressed")


@pytest.mark.parametrize("fmt", TABLES)
@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("n_rows", [4, 3], "has other numbers of rows than n_rows"),
        ("sample_idx", [10, None], "a sample has no number"),
        ("residual_layer_7", [[[1.0] * 5] * 3, [[1.0] * 4] * 4], "not 5 values"),
        ("residual_layer_7", [[[1.0] * 5] * 3, None], "has nulls"),
    ],
)
def test_columns_that_do_not_fit_together_are_refused(fmt, column, values, said):
    table = table_of(fmt)
    place = table.schema.get_field_index(column)
    field = table.schema.field(place)
    table = table.set_column(place, field, pyarrow.array(values, field.type))
    written = io.BytesIO()
    if fmt == "parquet":
        parquet.write_table(table, written, use_dictionary=False)
    else:
        with pyarrow.ipc.new_file(written, table.schema) as writer:
            writer.write_table(table)
    refused(fmt, written.getvalue(), said)


def test_other_formats_start_without_pyarrow(tmp_path):
    script = """
        import sys
        import core.reading, core.run.config, core.shards.formats, analyze_activations
        assert "pyarrow" not in sys.modules and "datasets" not in sys.modules
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, check=True)


def test_every_format_says_what_it_holds():
    assert {name: fmt.needs for name, fmt in FORMATS.items() if fmt.needs} == {"parquet": "pyarrow", "arrow": "pyarrow"}
    assert all({"float16", "float32", "int8"} <= set(fmt.dtypes) for fmt in FORMATS.values())
