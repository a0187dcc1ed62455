"""What a folder of whitened chunks says of itself."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from analysis.text_whitening.chunk_files import ChunkRecord
from analysis.text_whitening.settings import TextSettings
from analysis.whitening.stored_whitening import metadata_of as whitening_metadata
from analysis.whitening.whitening import Whitening

METADATA_FILE = "metadata.json"
WHITENING_FILE = "whitening.safetensors"


@dataclass(frozen=True)
class StoredTexts:
    """The result of the second pass.

    Attributes:
      n_tokens: that count. bytes: of the files. raw_bytes: of the arrays of activations, padding included.
    """

    output: str
    n_chunks: int
    n_samples: int
    n_tokens: int
    bytes: int
    raw_bytes: int

    @classmethod
    def of(cls, output: str, records: Sequence[ChunkRecord], row_bytes: int) -> "StoredTexts":
        """row_bytes: of the activations of one text."""
        n_samples, n_tokens = (sum(getattr(record, name) for record in records) for name in ("n_samples", "n_tokens"))
        stored = sum(record.bytes for record in records)
        return cls(output, len(records), n_samples, n_tokens, stored, n_samples * row_bytes)

    @property
    def compression(self) -> float:
        """Raw bytes over stored ones. Padding compresses to nothing: compare with `n_tokens` in mind."""
        return self.raw_bytes / self.bytes


def metadata_of(settings: TextSettings, whitening: Whitening, records: Sequence[ChunkRecord]) -> dict[str, Any]:
    """The content of metadata.json."""
    return {
        "processing_config": settings.to_json(),
        "whitening": whitening_metadata(whitening) | {"file": WHITENING_FILE},
        "shape": [sum(record.n_samples for record in records), settings.seq_len, whitening.kept],
        "n_tokens": sum(record.n_tokens for record in records),
        "chunks": [asdict(record) | {"name": record.name} for record in records],
    }
