"""Reads committed activations: `open_activations(url)`, docs/reading.md."""

from core.reading.activations import Activations, open_activations
from core.reading.samples import SampleActivations
from core.reading.shard_part import PartRows, ShardPart
from core.reading.token_batches import TokenBatch, TokenBatches

__all__ = [
    "Activations",
    "PartRows",
    "SampleActivations",
    "ShardPart",
    "TokenBatch",
    "TokenBatches",
    "open_activations",
]
