"""Texts as a person has them, and the padded rows that a compiled program takes.

Axes: S texts, T tokens of a text, L captured layers, W width of a site, V vocab; B rows of P tokens, padding included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Float, Int32

from core.base.errors import ModelError

# Lengths of rows: powers of two up to the last, then its multiples, so that few programs are compiled.
_SHORTEST, _MULTIPLE = 16, 128

# A text's token ids: a list or array.
TokenIds = Sequence[int] | np.ndarray | Array
Rows = Int32[np.ndarray, "B P"]
# Of a text: (T, V) logits, or site -> (L, T, W) with "logits" -> (T, V). Of an (S, T) array: an S before each T.
Found = Float[Array, "..."] | dict[str, Float[Array, "..."]]


@dataclass(frozen=True)
class Texts:
    """Token ids of texts. kind: whether one text was given, an (S, T) array or a list."""

    token_ids: tuple[Int32[np.ndarray, " _"], ...]
    kind: Literal["text", "array", "list"]

    @classmethod
    def of(cls, token_ids: Any, vocab_size: int, max_positions: int) -> Texts:
        """From a list or array of integers, a list of such, or an (S, T) array. Raises `ModelError` for all else."""
        kind: Literal["text", "array", "list"] = "list"
        if not isinstance(token_ids, list | tuple) or (token_ids and np.ndim(token_ids[0]) == 0):
            token_ids = np.asarray(token_ids)
            kind = "array" if token_ids.ndim == 2 else "text"
        texts = [np.asarray(text) for text in ([token_ids] if kind == "text" else token_ids)]
        if not texts:
            raise ModelError("no texts: give the token ids of at least one")
        return cls(tuple(_checked(text, vocab_size, max_positions) for text in texts), kind)

    def rows(self, multiple: int) -> tuple[Rows, Rows, Rows]:
        """tokens, segment_ids (0 for padding) and positions: one text a row, and a multiple of so many rows."""
        shape = -(-len(self.token_ids) // multiple) * multiple, _row_length(max(map(len, self.token_ids)))
        tokens, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row, text in enumerate(self.token_ids):
            tokens[row, : len(text)], segment_ids[row, : len(text)] = text, 1
        return tokens, segment_ids, np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)

    def without_padding(self, out: Mapping[str, Float[Array, "..."]]) -> Any:
        """What `Decoder.forward` gave of the rows, as `Decoder.__call__` hands it out."""
        if self.kind == "list":
            return [_part(out, row, len(text)) for row, text in enumerate(self.token_ids)]
        length = len(self.token_ids[0])
        return _part(out, 0 if self.kind == "text" else slice(len(self.token_ids)), length)


def _part(out: Mapping[str, Float[Array, "..."]], rows: int | slice, length: int) -> dict[str, Float[Array, "..."]]:
    return {name: x[rows, :length] if name == "logits" else x[:, rows, :length] for name, x in out.items()}


def _checked(text: np.ndarray, vocab_size: int, max_positions: int) -> Int32[np.ndarray, " T"]:
    if text.ndim != 1 or not np.issubdtype(text.dtype, np.integer) or not len(text):
        raise ModelError(f"token ids of shape {text.shape}, {text.dtype}: a text is a list of at least one integer")
    if len(text) > max_positions:
        raise ModelError(f"a text has {len(text)} tokens, the model knows {max_positions} positions")
    if not 0 <= text.min() <= text.max() < vocab_size:
        wrong = text[(text < 0) | (text >= vocab_size)][0]
        raise ModelError(f"token id {wrong} does not exist: the vocabulary has 0 to {vocab_size - 1}")
    return text.astype(np.int32)


def _row_length(longest: int) -> int:
    if longest > _MULTIPLE:
        return -(-longest // _MULTIPLE) * _MULTIPLE
    return max(_SHORTEST, 1 << (longest - 1).bit_length())
