"""arrow: Arrow's IPC file, a row for each sample and a column for each layer, not compressed: it is read in place.

See `core.shards.formats.arrow_columns` for the columns. A record batch holds samples of 64 MiB of values. Arrow has
neither bfloat16 nor float8. Format: https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format
"""

import io
import struct
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from core.base.dtypes import CODE_DTYPES, DTYPES
from core.object_store.sinks import Sink
from core.shards.formats.arrow_sink import ArrowSink
from core.shards.formats.arrow_table import shard_batches, shard_schema, stored_shard
from core.shards.formats.base import UNCOMPRESSED, ShardContent, StoredShard

_MAGIC_BYTES = 8
# Places in the tables of Message.fbs: the header of a message, and the compression of a record batch.
_HEADER_FIELD, _COMPRESSION_FIELD = 2, 3


class ArrowFormat:
    """See the module."""

    name = "arrow"
    suffix = ".arrow"
    dtypes = frozenset(DTYPES | CODE_DTYPES) - {"bfloat16", "float8_e4m3fn"}
    needs = "pyarrow"
    compressible = False
    expected_ratio = UNCOMPRESSED

    def write(self, content: ShardContent, sink: Sink, executor: Executor | None = None) -> None:
        """Streams one record batch after the other."""
        import pyarrow

        schema = shard_schema(content)
        with pyarrow.ipc.new_file(pyarrow.PythonFile(ArrowSink(sink), mode="w"), schema) as writer:
            for batch in shard_batches(content, schema):
                writer.write_batch(batch)

    def stored_bytes(self, values: Shaped[np.ndarray, "..."]) -> int:
        """What these values of one layer take in a file."""
        return values.nbytes

    def read(self, stream: BinaryIO) -> StoredShard:
        """Reads a whole shard; raises ValueError saying what is wrong with the bytes."""
        import pyarrow

        try:
            source = pyarrow.PythonFile(stream, mode="r")
            file = pyarrow.ipc.open_file(source)
            return stored_shard(file.schema, _batches(source, file))
        except (
            pyarrow.ArrowException,
            ArithmeticError,
            EOFError,
            LookupError,
            MemoryError,
            OSError,
            TypeError,
            AttributeError,
            struct.error,
        ) as error:
            raise ValueError(f"not a readable arrow shard: {error!r}") from error


def _batches(source: Any, file: Any) -> Iterator[Any]:
    """The record batches of a file, checked. One that is compressed is refused: it can expand to any size."""
    import pyarrow

    size, n_bytes = source.seek(0, io.SEEK_END), 0
    source.seek(_MAGIC_BYTES)
    messages = pyarrow.ipc.MessageReader.open_stream(source)
    first = next(messages, None)
    if first is None or first.type != "schema":
        raise ValueError("it does not begin with its schema")
    for _ in range(file.num_record_batches):
        message = next(messages, None)
        if message is None:
            raise ValueError("it ends before its last batch")
        if is_compressed(memoryview(message.metadata)):
            raise ValueError("it is compressed")
        batch = pyarrow.ipc.read_record_batch(message, file.schema)
        batch.validate(full=True)
        n_bytes += batch.nbytes
        if n_bytes > size:
            raise ValueError("its columns share their bytes")
        yield batch


def is_compressed(metadata: memoryview) -> bool:
    """Whether the message of a record batch says so. Format: FlatBuffers, Message.fbs of Arrow."""
    header = _field(metadata, int.from_bytes(metadata[:4], "little"), _HEADER_FIELD)
    if header is None:
        raise ValueError("a message has no header")
    (to_header,) = struct.unpack_from("<I", metadata, header)
    return _field(metadata, header + to_header, _COMPRESSION_FIELD) is not None


def _field(data: memoryview, table: int, number: int) -> int | None:
    """Where a field of a table of FlatBuffers is; None where it has its default."""
    (to_vtable,) = struct.unpack_from("<i", data, table)
    (size,) = struct.unpack_from("<H", data, table - to_vtable)
    if size < 4 + 2 * (number + 1):
        return None
    (place,) = struct.unpack_from("<H", data, table - to_vtable + 4 + 2 * number)
    return table + place if place else None
