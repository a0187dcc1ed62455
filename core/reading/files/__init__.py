"""One shard file, open for reading any rows of any layer of it.

A format whose files can be read in part has a file here and a line in OPENERS; any other is read whole.
"""

from collections.abc import Callable

from core.reading.files.base import ExpectedRows, RowFile
from core.reading.files.byte_ranges import ByteRanges, open_ranges
from core.reading.files.npz_rows import NpzRows
from core.reading.files.planes_rows import PlanesRows
from core.reading.files.safetensors_rows import SafetensorsRows
from core.reading.files.table_rows import arrow_rows, parquet_rows
from core.reading.files.whole_rows import WholeRows

OPENERS: dict[str, Callable[[ByteRanges, ExpectedRows], RowFile]] = {
    "safetensors": SafetensorsRows,
    "planes": PlanesRows,
    "npz": NpzRows,
    "parquet": parquet_rows,
    "arrow": arrow_rows,
}

__all__ = ["OPENERS", "ByteRanges", "ExpectedRows", "RowFile", "is_read_whole", "open_ranges", "open_rows"]


def is_read_whole(format_name: str) -> bool:
    """Whether any row of a file costs all of it."""
    return format_name not in OPENERS


def open_rows(format_name: str, ranges: ByteRanges, expected: ExpectedRows) -> RowFile:
    """Opens a file of this format. Raises ValueError, EOFError or OSError unless it is what its record says."""
    if is_read_whole(format_name):
        return WholeRows(format_name, ranges, expected)
    return OPENERS[format_name](ranges, expected)
