"""Chunks: some hundred samples in a row, padded to the longest of them.

Axis letters: N samples of a chunk, T tokens of the longest, K values of a whitened row.
"""

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64

from core.reading import ShardPart

NO_TOKEN = -1
"""The token id of padding."""


@dataclass(frozen=True)
class WhitenedChunk:
    """Attributes:
    activations: zeros where the mask is 0.
    attention_mask: 1 for a token that counts: stored, and not left out by a rule.
    token_ids: of all tokens of a sample that the model saw; -1 for padding.
    lengths: tokens that the model saw.
    """

    activations: Float[np.ndarray, "N T K"]
    attention_mask: Bool[np.ndarray, "N T"]
    token_ids: Int32[np.ndarray, "N T"]
    sample_idx: Int64[np.ndarray, "N"]
    lengths: Int32[np.ndarray, "N"]


def npz_bytes(arrays: Mapping[str, np.ndarray], *, compression: bool = True) -> bytes:
    """A file for `numpy.load`; equal arrays have equal bytes. compression: deflate, at its fastest level."""
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compression else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()


def _as_npz(chunk: WhitenedChunk) -> bytes:
    return npz_bytes(vars(chunk) | {"attention_mask": chunk.attention_mask.astype(np.uint8)})


CHUNK_WRITERS: dict[str, Callable[[WhitenedChunk], bytes]] = {"npz": _as_npz}
"""By the suffix of their files: what makes the bytes of a chunk. Another format of chunks is a line here."""


@dataclass(frozen=True)
class ChunkPlace:
    """Where the samples of chunk `number` lie: for each part, samples first to stop - 1 of it."""

    number: int
    pieces: tuple[tuple[ShardPart, int, int], ...]


def chunks_of(parts: Sequence[ShardPart], n_samples: int) -> Iterator[ChunkPlace]:
    """Cuts all samples, in their order, into chunks of `n_samples`; the last may have fewer."""
    number, missing = 0, n_samples
    pieces: list[tuple[ShardPart, int, int]] = []
    for part in parts:
        first = 0
        while first < part.n_samples:
            stop = min(first + missing, part.n_samples)
            pieces.append((part, first, stop))
            missing -= stop - first
            first = stop
            if not missing:
                yield ChunkPlace(number, tuple(pieces))
                number, missing, pieces = number + 1, n_samples, []
    if pieces:
        yield ChunkPlace(number, tuple(pieces))
