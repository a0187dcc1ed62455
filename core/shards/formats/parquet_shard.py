"""parquet: a row for each sample and a column for each layer, see `core.shards.formats.arrow_columns` for the columns.

Values are split into byte planes (BYTE_STREAM_SPLIT) and compressed with zstd, in row groups of 64 MiB of values. Pages
have checksums. Format: https://parquet.apache.org/docs/file-format/
Lists of lists are the only layout that datasets loads as arrays; `python -m benchmarks.storage.layouts` has its cost
beside others. Parquet has neither bfloat16 nor float8.
"""

import io
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from core.base.dtypes import CODE_DTYPES, DTYPES
from core.object_store.sinks import Sink
from core.shards.formats.arrow_columns import ArrayColumn, nested_lists, parse_column, table_schema
from core.shards.formats.arrow_sink import ArrowSink
from core.shards.formats.arrow_table import shard_batches, shard_schema, stored_shard
from core.shards.formats.base import ShardContent, StoredShard
from core.shards.formats.parquet_footer import read_chunks

# Thrift: a string field, one after the last.
_STRING = 0x18
_CREATED_BY = b"qwen2-jax-activations version 1"
# Dictionaries and runs can stand for any number of values; levels of lists are runs in every file.
_VALUE_ENCODINGS = {"PLAIN", "BYTE_STREAM_SPLIT", "RLE"}
# No real file compresses so well: one that does was made to fill the memory.
# Samples without rows are a value each, and no byte.
_LEVELS_ALONE = 1 << 20
_MOST_EXPANSION, _ALWAYS_ALLOWED = 200, 256 << 20


class ParquetFormat:
    """See the module."""

    name = "parquet"
    suffix = ".parquet"
    dtypes = frozenset(DTYPES | CODE_DTYPES) - {"bfloat16", "float8_e4m3fn"}
    needs = "pyarrow"
    compressible = False
    expected_ratio: Mapping[str, float] = MappingProxyType(
        {"float16": 0.88, "bfloat16": 1.0, "float32": 0.86, "int8": 0.95, "float8_e4m3fn": 1.0}
    )

    def write(self, content: ShardContent, sink: Sink, executor: Executor | None = None) -> None:
        """Streams one row group after the other."""
        schema = shard_schema(content)
        write_parquet(sink, schema, shard_batches(content, schema))

    def stored_bytes(self, values: Shaped[np.ndarray, "..."]) -> int:
        """What these values of one layer take in a file."""
        column = ArrayColumn("values", values.dtype.name, max(1, values.size))
        array = nested_lists(values.reshape(1, -1), [1])
        import pyarrow

        sink, schema = io.BytesIO(), table_schema([column], {})
        write_parquet(sink, schema, iter([pyarrow.record_batch([array], schema=schema)]))
        return len(sink.getvalue())

    def read(self, stream: BinaryIO) -> StoredShard:
        """Reads a whole shard; raises ValueError saying what is wrong with the bytes."""
        import pyarrow

        try:
            file = open_parquet(pyarrow.PythonFile(stream, mode="r"))
            return stored_shard(file.schema_arrow, row_groups(file))
        except (
            pyarrow.ArrowException,
            ArithmeticError,
            EOFError,
            LookupError,
            OSError,
            TypeError,
            AttributeError,
        ) as error:
            raise ValueError(f"not a readable parquet shard: {error!r}") from error


def write_parquet(sink: Sink, schema: Any, batches: Iterator[Any]) -> None:
    """Writes a Parquet file, a row group for each batch. The bytes do not say which version of pyarrow wrote them."""
    import pyarrow
    from pyarrow import parquet

    arrays = [field.name for field in schema if b"ARROW:extension:name" in (field.metadata or {})]
    file = ArrowSink(sink)
    writer = parquet.ParquetWriter(
        pyarrow.PythonFile(file, mode="w"),
        schema,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        use_byte_stream_split=[f"{name}.list.element.list.element" for name in arrays],
        write_statistics=[name for name in schema.names if name == "sample_idx"],
        write_page_checksum=True,
    )
    for batch in batches:
        writer.write_table(pyarrow.Table.from_batches([batch]), row_group_size=max(1, batch.num_rows))
    footer = file.hold()
    writer.close()
    sink.write(_without_version(bytes(footer)))


def _without_version(footer: bytes) -> bytes:
    """The end of a file with another `created_by`: pyarrow would store its version there.

    Format: FileMetaData of parquet.thrift in the compact protocol, its length, `PAR1`.
    """
    place = footer.rindex(b"parquet-cpp-arrow version ")
    length = footer[place - 1]
    if footer[place - 2] != _STRING or length > 127:
        raise RuntimeError("this version of pyarrow ends Parquet files in a way that is not known here")
    described = footer[: place - 1] + bytes([len(_CREATED_BY)]) + _CREATED_BY + footer[place + length : -8]
    return described + len(described).to_bytes(4, "little") + footer[-4:]


def open_parquet(source: Any) -> Any:
    """A `pyarrow.parquet.ParquetFile` of a shard, whose content is untrusted.

    Raises ValueError or EOFError if its footer is damaged, or says that columns expand to far more than the file has.
    """
    from pyarrow import parquet

    chunks = read_chunks(source)
    for chunk in chunks:
        if not set(chunk.encodings) <= _VALUE_ENCODINGS:
            raise ValueError(f"{chunk.path} is encoded as {', '.join(chunk.encodings)}")
        if parse_column(chunk.path.partition(".")[0]) and chunk.n_values > chunk.uncompressed + _LEVELS_ALONE:
            raise ValueError(f"{chunk.path} has {chunk.n_values} values in {chunk.uncompressed} bytes")
    size, expanded = source.seek(0, io.SEEK_END), sum(chunk.uncompressed for chunk in chunks)
    if expanded > _MOST_EXPANSION * size + _ALWAYS_ALLOWED:
        raise ValueError(f"{size} bytes would expand to {expanded}")
    source.seek(0)
    return parquet.ParquetFile(source, page_checksum_verification=True)


def row_groups(file: Any) -> Iterator[Any]:
    """Each row group as one record batch."""
    for group in range(file.metadata.num_row_groups):
        table = file.read_row_group(group, use_threads=False).combine_chunks()
        batches = table.to_batches()
        if len(batches) != 1:
            raise ValueError(f"row group {group} has no rows, or too many")
        yield batches[0]
