"""Activations of texts as padded batches.

Axis letters: N texts, T tokens of a row, padding included (`seq_len`), D width of a token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32

from core.in_memory.capturer import Capturer

_BATCH_BYTES = 256 << 20
NO_TOKEN = -1
"""The token id of padding."""


@dataclass(frozen=True)
class PaddedBatch:
    """Texts first to first + N of a chunk; activations are zero at padding."""

    first: int
    activations: Float32[np.ndarray, "N T D"]
    attention_mask: Bool[np.ndarray, "N T"]
    token_ids: Int32[np.ndarray, "N T"]


def padded_batches(
    capturer: Capturer, site: str, layer: int, texts: Sequence[str], seq_len: int
) -> Iterator[PaddedBatch]:
    """The texts in batches whose activations take 256 MB at most. Only tokens up to `seq_len` are computed."""
    width = capturer.shape.site_widths[site]
    size = max(1, _BATCH_BYTES // (seq_len * width * 4))
    for first in range(0, len(texts), size):
        token_ids = _encode(capturer.tokenizer, texts[first : first + size], seq_len)
        yield _batch(capturer, site, layer, first, token_ids, (seq_len, width))


def _encode(tokenizer: Any, texts: Sequence[str], seq_len: int) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    return [ids[:seq_len] for ids in encoded]


def _batch(
    capturer: Capturer, site: str, layer: int, first: int, token_ids: list[list[int]], shape: tuple[int, int]
) -> PaddedBatch:
    activations = np.zeros((len(token_ids), *shape), np.float32)
    mask = np.zeros((len(token_ids), shape[0]), bool)
    ids = np.full((len(token_ids), shape[0]), NO_TOKEN, np.int32)
    # A text without a token, of a tokenizer that puts none before it, is a row of padding.
    rows = [row for row, of_text in enumerate(token_ids) if of_text]
    found = capturer([token_ids[row] for row in rows])[site][layer] if rows else []
    for row, values in zip(rows, found, strict=True):
        activations[row, : len(values)] = values
        mask[row, : len(values)] = True
        ids[row, : len(values)] = token_ids[row]
    return PaddedBatch(first, activations, mask, ids)
