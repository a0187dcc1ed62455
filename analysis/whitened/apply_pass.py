"""The pass that writes whitened chunks: its parts are chunks, its partials what metadata.json says of them.

Axis letters: T tokens of a sample, S samples, D width of a row, K width of a whitened row.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from analysis.passes import PartFacts
from analysis.whitened.chunks import CHUNK_WRITERS, NO_TOKEN, ChunkPlace, WhitenedChunk
from analysis.whitening import Whitening
from core.base.dtypes import DTYPES
from core.base.errors import RunError
from core.object_store import Created, open_store
from core.reading import PartRows, ShardPart
from core.reading.dropping import Dropping

Entries = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class _Sample:
    """values: (T, K), zeros where `counts` is False. token_ids, counts: (T,)."""

    sample_idx: int
    values: np.ndarray
    counts: np.ndarray
    token_ids: np.ndarray


@dataclass(frozen=True)
class ApplyPass:
    """Whitens one layer chunk by chunk into `output`.

    Attributes:
      whitening_digest: sha256 of the file that `whitening` was read from.
      writer: a name in `CHUNK_WRITERS`. dtype: of the stored values.
    """

    site: str
    layer: int
    drop: Dropping
    whitening_digest: str
    whitening: Whitening = field(repr=False)
    output: str
    writer: str
    dtype: str

    @property
    def name(self) -> str:
        """See `Pass`."""
        return "whiten-apply"

    @property
    def version(self) -> int:
        """See `Pass`."""
        return 1

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `Pass`."""
        own = {name: getattr(self, name) for name in ("site", "layer", "whitening_digest", "output", "writer", "dtype")}
        return own | {"drop": asdict(self.drop)}

    def facts(self, part: ChunkPlace) -> PartFacts:
        """See `Pass`."""
        identity: list[Any] = [part.number]
        n_bytes = 0
        for piece, first, stop in part.pieces:
            files = [file for file in piece.files if file.site in (None, self.site)]
            identity.append([piece.folder, first, stop, [file.sha256 for file in files]])
            n_bytes += sum(file.bytes for file in files) * (stop - first) // piece.n_samples
        return PartFacts(f"chunk {part.number}", n_bytes, identity)

    def map(self, part: ChunkPlace) -> Entries:
        """Writes one chunk and says what it is. Raises RunError for values that the dtype cannot hold."""
        samples = [sample for piece in part.pieces for sample in self._samples(*piece)]
        chunk = _padded(samples, self.dtype, self.whitening.kept)
        if not np.isfinite(chunk.activations).all():
            raise RunError(f"chunk {part.number}: whitened values overflow {self.dtype}: use --dtype float32")
        data = CHUNK_WRITERS[self.writer](chunk)
        name = f"chunks/chunk_{part.number:04d}.{self.writer}"
        if open_store(self.output).create_bytes(name, data) is Created.ALREADY_DIFFERENT:
            raise RunError(f"{self.output}/{name} exists with other content: choose another --output")
        counts = {"n_samples": len(samples), "n_tokens": int(chunk.attention_mask.sum())}
        digest = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return ({"file": name, "longest": chunk.token_ids.shape[1]} | counts | digest,)

    def merge(self, a: Entries, b: Entries) -> Entries:
        """Side by side."""
        return a + b

    def finish(self, partial: Entries) -> Entries:
        """All entries, in order."""
        return partial

    def pack(self, partial: Entries) -> bytes:
        """JSON."""
        return json.dumps(partial).encode()

    def unpack(self, data: bytes) -> Entries:
        """The inverse of `pack`."""
        return tuple(json.loads(data))

    def _samples(self, part: ShardPart, first: int, stop: int) -> Iterator[_Sample]:
        rows = part.read(self.site, self.layer)
        for place in range(first, stop):
            yield self._sample(rows, place)

    def _sample(self, rows: PartRows, place: int) -> _Sample:
        row = rows.samples[place]
        span = rows.span_of(place, row)
        samples, positions, token_ids = rows.token_index([span])
        kept = self.drop.kept(rows, samples, positions, token_ids)
        kept = np.ones(len(positions), bool) if kept is None else kept
        counts = np.zeros(len(row.token_ids), bool)
        counts[positions[kept]] = True
        values = np.zeros((len(counts), self.whitening.kept), np.float32)
        values[counts] = self.whitening.apply(rows.rows(self.layer, *span)[kept])
        return _Sample(row.sample_idx, values, counts, row.token_ids)


def _padded(samples: list[_Sample], dtype: str, width: int) -> WhitenedChunk:
    shape = len(samples), max(len(sample.counts) for sample in samples)
    activations = np.zeros((*shape, width), DTYPES[dtype])
    mask, token_ids = np.zeros(shape, bool), np.full(shape, NO_TOKEN, np.int32)
    for place, sample in enumerate(samples):
        length = len(sample.counts)
        with np.errstate(over="ignore"):
            activations[place, :length] = sample.values
        mask[place, :length], token_ids[place, :length] = sample.counts, sample.token_ids
    sample_idx = np.array([sample.sample_idx for sample in samples], np.int64)
    return WhitenedChunk(
        activations, mask, token_ids, sample_idx, np.array([len(sample.counts) for sample in samples], np.int32)
    )
