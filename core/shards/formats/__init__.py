"""The formats a shard can be stored in. A new one is a new file here and a line in FORMATS."""

import functools
import importlib.util
import zlib
from typing import BinaryIO

from isal import igzip, igzip_lib

from core.base.errors import UsageError
from core.shards.formats.arrow_shard import ArrowFormat
from core.shards.formats.base import Outline, ShardContent, ShardFormat, StoredShard
from core.shards.formats.npz_shard import NpzFormat
from core.shards.formats.parquet_shard import ParquetFormat
from core.shards.formats.pickle_shard import PickleFormat
from core.shards.formats.planes_shard import PlanesFormat
from core.shards.formats.safetensors_shard import SafetensorsFormat

FORMATS: dict[str, ShardFormat] = {
    fmt.name: fmt
    for fmt in (PickleFormat(), SafetensorsFormat(), PlanesFormat(), NpzFormat(), ParquetFormat(), ArrowFormat())
}

__all__ = [
    "FORMATS",
    "Outline",
    "ShardContent",
    "ShardFormat",
    "StoredShard",
    "read_shard",
    "require_format",
]


@functools.cache
def require_format(name: str) -> None:
    """Raises UsageError if the package that a format needs is not installed."""
    needs = FORMATS[name].needs
    if needs is not None and importlib.util.find_spec(needs) is None:
        raise UsageError(f"the format {name} needs {needs}: pip install -c constraints.txt -e '.[datasets]'")


def read_shard(stream: BinaryIO, format_name: str, *, gzipped: bool) -> StoredShard:
    """Reads a shard file of any format.

    Raises ValueError saying what is wrong with it, UsageError if a package is missing.
    """
    require_format(format_name)
    try:
        if not gzipped:
            return FORMATS[format_name].read(stream)
        with igzip.open(stream, "rb") as raw:
            return FORMATS[format_name].read(raw)
    except (EOFError, OSError, zlib.error, igzip_lib.IsalError) as error:  # type: ignore[misc]  # an exception, untyped
        raise ValueError(f"not a whole file: {error}") from error
