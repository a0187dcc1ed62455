"""Reads committed activations: `open_activations(url)`, docs/reading.md."""

from core.reading.activations import Activations, open_activations
from core.reading.shard_part import PartRows, ShardPart

__all__ = ["Activations", "PartRows", "ShardPart", "open_activations"]
