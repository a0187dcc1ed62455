"""What is exported: plain values that decide every byte of an export, together with the activations."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from core.base.dtypes import DTYPES
from core.reading.dropping import Dropping


@dataclass(frozen=True)
class ItemCut:
    """How the rows of a part become items.

    Attributes:
      drop: tokens that are left out first.
      context_size: rows of an item; None: an item is a sample.
      keeps_short: whether the last, shorter context of a sample is an item, too.
    """

    site: str
    layer: int
    drop: Dropping
    context_size: int | None
    keeps_short: bool


@dataclass(frozen=True)
class ExportRequest:
    """One export.

    Attributes:
      to: name of the target. cut: which items. width: values of a row.
      dtype: of the exported values. hook_name: what the other tool calls the place of the model.
      seed: of the shuffle, where the target shuffles. file_bytes: of the values in a file, at most (at least one item).
      longest: rows of the longest item.
      described: facts about the run, for the metadata of the other format.
    """

    to: str
    cut: ItemCut
    width: int
    dtype: str
    hook_name: str
    seed: int
    file_bytes: int
    longest: int
    described: dict[str, Any]

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype of the exported values."""
        return DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of values."""
        return self.width * self.numpy_dtype.itemsize

    @property
    def item_rows(self) -> int:
        """Rows of an item where all are made equally long by padding."""
        return self.cut.context_size or max(1, self.longest)
