"""Stored samples by their number.

Axis letters: T tokens of a sample that the model saw, K rows that are stored of it, D values of a row.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Shaped

from core.reading.sample_table import SampleRow
from core.reading.shard_part import PartRows, ShardPart
from core.reading.unprojection import Unprojection


class OpenParts:
    """Parts that are open at their sites; those that were used longest ago are closed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: OrderedDict[tuple[ShardPart, str], PartRows] = OrderedDict()

    def rows(self, part: ShardPart, site: str) -> PartRows:
        """The part, open at a site, with all its layers."""
        key = part, site
        if key not in self._open:
            while len(self._open) >= self._limit:
                self._open.popitem(last=False)
            self._open[key] = part.read(site)
        self._open.move_to_end(key)
        return self._open[key]


@dataclass(frozen=True)
class SampleActivations:
    """One stored sample; arrays are read when they are asked for.

    Attributes:
      part: where it is stored.
    """

    part: ShardPart
    _place: int
    _row: SampleRow = field(repr=False)
    _open: OpenParts = field(repr=False)
    _unprojection: Unprojection | None = field(default=None, repr=False)

    @property
    def sample_idx(self) -> int:
        """Its position in the stream."""
        return self._row.sample_idx

    @property
    def token_ids(self) -> Int32[np.ndarray, "T"]:
        """All tokens that the model saw."""
        return self._row.token_ids

    @property
    def positions(self) -> Int32[np.ndarray, "K"]:
        """The places among `token_ids` of the stored tokens (with pools: of those that were pooled)."""
        return self._row.positions

    @property
    def labels(self) -> dict[str, Any]:
        """The other keys of the stream's line."""
        return self._row.labels

    @property
    def text_preview(self) -> str:
        """The first characters of its text."""
        return self._row.text_preview

    @property
    def full_length(self) -> int:
        """Tokens before truncation."""
        return self._row.full_length

    @property
    def dropped(self) -> dict[str, list[list[int]]]:
        """Reason → ranges of tokens that are not stored."""
        return self._row.dropped

    def activation(self, layer: int | None = None, site: str | None = None) -> Float32[np.ndarray, "K D"]:
        """Its rows in float32: one for each of `positions`, or one for each pool.

        Raises UsageError for a layer or site that is not stored, RunError naming a damaged file.
        """
        rows, layer, span = self._span(layer, site)
        restored = rows.rows(layer, *span)
        return restored if self._unprojection is None else self._unprojection(restored, layer)

    def stored(self, layer: int | None = None, site: str | None = None) -> dict[str, Shaped[np.ndarray, "K _"]]:
        """The same as it is stored: `activation`, and where reduced `scale` and `indices`."""
        rows, layer, span = self._span(layer, site)
        return rows.stored(layer, *span)

    def _span(self, layer: int | None, site: str | None) -> tuple[PartRows, int, tuple[int, int]]:
        site = self.part.site(site)
        layer = self.part.layer(site, layer)
        rows = self._open.rows(self.part, site)
        return rows, layer, rows.span_of(self._place, self._row)
