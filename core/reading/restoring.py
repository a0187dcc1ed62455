"""Rows in float32, as close to the model's values as what is stored allows.

Axis letters: k rows, L layers, W stored values of a row, E width before topk, D width of the site.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Shaped

from core.base.dtypes import ARRAY_DTYPES
from core.commit.record import StoredSite
from core.reduce.reductions import INDICES, SCALE, VALUES, StoredArray, restore


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
        return restore(arrays, self.width, self.block)
