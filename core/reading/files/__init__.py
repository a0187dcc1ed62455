"""One shard file, open for reading any rows of any layer of it. A format is a file here and a line in OPENERS."""

from collections.abc import Callable

from core.reading.files.base import ExpectedRows, RowFile
from core.reading.files.byte_ranges import ByteRanges, open_ranges
from core.reading.files.npz_rows import NpzRows
from core.reading.files.pickle_rows import PickleRows
from core.reading.files.planes_rows import PlanesRows
from core.reading.files.safetensors_rows import SafetensorsRows
from core.reading.files.table_rows import arrow_rows, parquet_rows

OPENERS: dict[str, Callable[[ByteRanges, ExpectedRows], RowFile]] = {
    "pickle": PickleRows,
    "safetensors": SafetensorsRows,
    "planes": PlanesRows,
    "npz": NpzRows,
    "parquet": parquet_rows,
    "arrow": arrow_rows,
}
WHOLE_FORMATS = ("pickle",)
"""Formats of which any row costs the whole file."""

__all__ = ["OPENERS", "WHOLE_FORMATS", "ByteRanges", "ExpectedRows", "RowFile", "open_ranges"]
