"""The interface of an open shard file, and what its commit record says must be in it.

Axis letters: S samples, N stored rows of all of them, one after the other, k rows of a range, W values of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Int32, Int64, Shaped

from core.reduce.reductions import StoredArray


@dataclass(frozen=True)
class ExpectedRows:
    """What the commit record says of the file of one part and site.

    Attributes:
      site: its name. layers: its layer numbers, in their stored order.
      arrays: the arrays of a row, by the names of `core.reduce.reductions`.
      n_rows: of each array; None where the record does not say: pools of a part of a window that has empty samples.
      gzipped: whether gzip is around the file.
    """

    site: str
    layers: tuple[int, ...]
    arrays: Mapping[str, StoredArray]
    n_samples: int
    n_rows: int | None
    gzipped: bool

    def check_index(self, sample_idx: Int64[np.ndarray, "S"], offsets: Int64[np.ndarray, "S_plus_1"]) -> None:
        """Raises ValueError unless offsets cut the expected rows into the expected number of samples."""
        if len(sample_idx) != self.n_samples or len(offsets) != self.n_samples + 1:
            raise ValueError(f"it has {len(sample_idx)} samples, its record says {self.n_samples}")
        if offsets[0] != 0 or (np.diff(offsets) < 0).any():
            raise ValueError("its sample offsets do not cut its rows")
        if self.n_rows is not None and offsets[-1] != self.n_rows:
            raise ValueError(f"it has {offsets[-1]} rows, its record says {self.n_rows}")

    def check_array(self, name: str, shape: tuple[int, ...], dtype: np.dtype, n_rows: int) -> None:
        """Raises ValueError unless an array of a layer has the expected width and dtype and `n_rows` rows."""
        wanted = self.arrays[name]
        if shape != (n_rows, wanted.width) or dtype != wanted.dtype:
            raise ValueError(
                f"{name} is {dtype} of shape {shape}, its record says {wanted.dtype} of {(n_rows, wanted.width)}"
            )


class RowFile(Protocol):
    """A shard file that is open. Methods raise ValueError, EOFError or OSError for damaged bytes.

    Attributes:
      sample_idx: of its samples, in their order.
      offsets: sample s owns rows offsets[s] to offsets[s + 1].
    """

    sample_idx: Int64[np.ndarray, "S"]
    offsets: Int64[np.ndarray, "S_plus_1"]

    def rows(self, layer: int, array: str, start: int, stop: int) -> Shaped[np.ndarray, "k W"]:
        """Rows start to stop - 1 of an array of a layer, as stored; may be a read-only view of the mapped file."""
        ...

    def token_ids(self, start: int, stop: int) -> Int32[np.ndarray, "k"] | None:
        """The token of each row; None if the file does not have them: those of pickles are in the sample table."""
        ...

    def positions(self, start: int, stop: int) -> Int32[np.ndarray, "k"] | None:
        """The place of each row's token in its sample; None where all tokens are stored, or rows are pools."""
        ...
