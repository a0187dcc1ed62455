"""The formats a shard can be stored in. A new one is a new file here and a line in FORMATS."""

from core.formats.base import DTYPES, ShardContent, ShardFormat, StoredShard
from core.formats.pickle_shard import PickleFormat
from core.formats.safetensors_shard import SafetensorsFormat

FORMATS: dict[str, ShardFormat] = {fmt.name: fmt for fmt in (PickleFormat(), SafetensorsFormat())}

__all__ = ["DTYPES", "FORMATS", "ShardContent", "ShardFormat", "StoredShard"]
