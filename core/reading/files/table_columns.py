"""Single columns of Parquet and Arrow files: only the bytes of the column and group that are asked for are read."""

import mmap
from typing import Any, Protocol

from core.reading.files.byte_ranges import ByteRanges, as_stream
from core.shards.formats import require_format
from core.shards.formats.parquet_shard import open_parquet


class TableColumns(Protocol):
    """A table whose rows are cut into groups: row groups, or record batches.

    Attributes:
      schema: of Arrow.
      n_groups: how many groups there are.
    """

    schema: Any
    n_groups: int

    def column(self, group: int, name: str) -> Any:
        """An Arrow array. Raises what pyarrow does."""
        ...


class ParquetColumns:
    """See `TableColumns`."""

    def __init__(self, ranges: ByteRanges) -> None:
        require_format("parquet")
        self._file = open_parquet(_source(ranges))
        self.schema = self._file.schema_arrow
        self.n_groups = self._file.metadata.num_row_groups

    def column(self, group: int, name: str) -> Any:
        """See `TableColumns`."""
        chunked = self._file.read_row_group(group, columns=[name], use_threads=False).column(name)
        return chunked.chunk(0) if chunked.num_chunks == 1 else chunked.combine_chunks()


class ArrowColumns:
    """See `TableColumns`."""

    def __init__(self, ranges: ByteRanges) -> None:
        require_format("arrow")
        from pyarrow import ipc

        self._ranges = ranges
        file = ipc.open_file(_source(ranges))
        self.schema, self.n_groups = file.schema, file.num_record_batches
        self._files: dict[str, Any] = {}

    def column(self, group: int, name: str) -> Any:
        """See `TableColumns`."""
        from pyarrow import ipc

        if name not in self._files:
            options = ipc.IpcReadOptions(included_fields=[self.schema.get_field_index(name)], use_threads=False)
            self._files[name] = ipc.open_file(_source(self._ranges), options=options)
        column = self._files[name].get_batch(group).column(0)
        column.validate(full=True)
        return column


def _source(ranges: ByteRanges) -> Any:
    """The file as pyarrow reads it: the mapped bytes themselves, else range by range."""
    import pyarrow

    first = ranges.read(0, min(1, ranges.size))
    if isinstance(first.obj, mmap.mmap):
        return pyarrow.BufferReader(pyarrow.py_buffer(ranges.read(0, ranges.size)))
    return pyarrow.PythonFile(as_stream(ranges), mode="r")
