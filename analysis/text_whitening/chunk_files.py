"""Whitened chunks as files: each `.npz` with a record that is written after it, both once.

Axis letters: N texts of a chunk, T tokens of a row, padding included, K width of a whitened token.
"""

import io
import zipfile
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64

from analysis.whitened.chunks import npz_bytes
from core.base.canonical_json import canonical_json
from core.base.errors import RunError
from core.base.json_types import Kinds, mistyped
from core.object_store import Created, ObjectStore, bytes_info
from core.object_store.single_file import read_json_object

_RECORD: Kinds = {"number": (int,), "texts": (str,), "n_samples": (int,), "n_tokens": (int,), "bytes": (int,)}


@dataclass(frozen=True)
class ChunkFile:
    """The content of a file.

    Attributes:
      activations: zero where the mask is 0.
      attention_mask: 1 for a token that counts: neither padding nor excluded.
      token_ids: of all tokens, -1 for padding.
    """

    activations: Float[np.ndarray, "N T K"]
    attention_mask: Bool[np.ndarray, "N T"]
    token_ids: Int32[np.ndarray, "N T"]
    sample_ids: Int64[np.ndarray, "N"]

    def check(self) -> None:
        """Raises RunError where values and mask contradict each other, or a value is not finite."""
        if not np.isfinite(self.activations).all():
            largest = np.finfo(self.activations.dtype).max
            raise RunError(f"a whitened value exceeds {largest:.0f} or is NaN: use dtype='float32' or a higher floor")
        if self.activations[~self.attention_mask].any():
            raise RunError("a token that does not count has values")
        if (self.token_ids[self.attention_mask] < 0).any():
            raise RunError("a token that counts has no id")


@dataclass(frozen=True)
class ChunkRecord:
    """What is known of a stored chunk. texts: the digest of its `TextChunk`. whitening: of what whitened it."""

    number: int
    texts: str
    whitening: str
    n_samples: int
    n_tokens: int
    bytes: int
    crc32c: str

    @property
    def name(self) -> str:
        """Of the file."""
        return chunk_name(self.number)


def chunk_name(number: int) -> str:
    """`chunks/chunk_0000.npz`."""
    return f"chunks/chunk_{number:04d}.npz"


def _record_name(number: int) -> str:
    return f"chunks/chunk_{number:04d}.json"


def store_chunk(
    store: ObjectStore, chunk: ChunkFile, number: int, texts: str, whitening: str, *, compression: bool
) -> ChunkRecord:
    """Writes a chunk and its record. Raises RunError if another file has its name."""
    chunk.check()
    arrays = vars(chunk) | {"attention_mask": chunk.attention_mask.astype(np.uint8)}
    data = npz_bytes(arrays, compression=compression)
    info = bytes_info(data)
    record = ChunkRecord(
        number, texts, whitening, len(chunk.sample_ids), int(chunk.attention_mask.sum()), info.size, info.crc32c
    )
    for name, content in ((record.name, data), (_record_name(number), canonical_json(vars(record)))):
        if store.create_bytes(name, content) is Created.ALREADY_DIFFERENT:
            raise RunError(f"{store.url}/{name}: another file has this name: delete it, or use another output_dir")
    return record


def stored_record(store: ObjectStore, number: int) -> ChunkRecord | None:
    """The record of a chunk whose file is whole; None if there is none: then what is left of the chunk is removed."""
    try:
        found = read_json_object(store, _record_name(number))
    except FileNotFoundError:
        store.delete(chunk_name(number))
        return None
    if mistyped(found, _RECORD) is None and found.keys() == ChunkRecord.__dataclass_fields__.keys():
        record = ChunkRecord(**found)
        info = store.info(record.name)
        if info is not None and (info.size, info.crc32c) == (record.bytes, record.crc32c):
            return record
    for name in (_record_name(number), chunk_name(number)):
        store.delete(name)
    return None


def read_chunk(store: ObjectStore, record: ChunkRecord) -> ChunkFile:
    """A stored chunk. Raises RunError naming the file if it is damaged."""
    try:
        with np.load(io.BytesIO(store.read_bytes(record.name)), allow_pickle=False) as found:
            mask = found["attention_mask"].astype(bool)
            chunk = ChunkFile(found["activations"], mask, found["token_ids"], found["sample_ids"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise RunError(f"{store.url}/{record.name}: cannot be read ({error}): process the texts again") from error
    return chunk
