"""Rows in float32, as close to the model's values as what is stored allows.

Axis letters: k rows, L layers, W stored values of a row, E width before topk, D width of the site.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Shaped

from core.base.dtypes import ARRAY_DTYPES, DTYPES
from core.commit.record import StoredSite
from core.reduce.reductions import INDICES, SCALE, VALUES, StoredArray, restore

_BFLOAT16 = DTYPES["bfloat16"]


@dataclass(frozen=True)
class StoredForm:
    """How the rows of a site are stored.

    Attributes:
      width: of a restored row: E.
      arrays: of a row, by the names of `core.reduce.reductions`.
      block: of quantized rows, how many values share a scale; 0: all of them.
    """

    width: int
    arrays: Mapping[str, StoredArray]
    block: int | None

    @classmethod
    def of(cls, site: StoredSite, dtype: str) -> "StoredForm":
        """What a commit record says of a site; dtype: the record's. Raises ValueError for what cannot be."""
        described = site.arrays or {VALUES: {"width": site.width, "dtype": dtype}}
        arrays = {name: StoredArray(array["width"], ARRAY_DTYPES[array["dtype"]]) for name, array in described.items()}
        if not {VALUES} <= arrays.keys() <= {VALUES, SCALE, INDICES} or min(a.width for a in arrays.values()) < 1:
            raise ValueError(f"a site has arrays {described}")
        return cls(site.width, arrays, site.block)

    def restore(self, arrays: Mapping[str, Shaped[np.ndarray, "*rows _"]]) -> Float32[np.ndarray, "*rows _"]:
        """The rows as float32: scales applied to codes, values of topk at their places, zero elsewhere."""
        return to_float32(arrays[VALUES]) if arrays.keys() == {VALUES} else restore(arrays, self.width, self.block)


def to_float32(values: Shaped[np.ndarray, "*rows W"]) -> Float32[np.ndarray, "*rows W"]:
    """A copy in float32, exact for every stored dtype."""
    if values.dtype != _BFLOAT16:
        return values.astype(np.float32)
    # bfloat16 is the upper half of a float32; a shift of integers is several times as fast as a cast of ml_dtypes.
    wide = np.empty(values.shape, np.uint32)
    np.left_shift(values.view(np.uint16), np.uint32(16), out=wide, dtype=np.uint32, casting="unsafe")
    return wide.view(np.float32)
