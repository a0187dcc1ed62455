"""Projected rows back in the space of the model, where the matrix is at hand: a run keeps its digest alone.

Axis letters: k rows, D width of the site, E width after the projection, L stored layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from core.base.errors import UsageError
from core.reduce.projection import Projection, read_projection


@dataclass(frozen=True, eq=False)
class Unprojection:
    """The least-squares inverse of (x - mean) @ matrix: of all x with these rows the one closest to the mean.

    Attributes:
      inverse: (M, E, D), mean: (N, D); M or N = 1 for all layers, else one for each of `layers`.
      layers: those that the run stores, in their order.
    """

    inverse: Float32[np.ndarray, "M E D"]
    mean: Float32[np.ndarray, "N D"]
    layers: tuple[int, ...]

    def __call__(self, rows: Float32[np.ndarray, "k E"], layer: int) -> Float32[np.ndarray, "k D"]:
        """The rows of one layer in the space of the model."""
        inverse, mean = (_of_layer(array, self.layers.index(layer)) for array in (self.inverse, self.mean))
        return rows @ inverse + mean


def unprojection(url: str, identity: dict[str, Any], layers: Sequence[int]) -> Unprojection:
    """Reads the file that `--project` had. Raises UsageError unless it is the one of the run with this identity."""
    reduction = identity.get("reduction") or {}
    projection = read_projection(url)
    if reduction.get("project") != projection.to_json():
        raise UsageError(f"projection={url!r}: its values are not those that the run was projected with")
    if "max" in reduction["pool"]:
        raise UsageError(f"projection={url!r}: the largest values of projected tokens are no projection of a vector")
    return _inverse(projection, tuple(layers))


def _inverse(projection: Projection, layers: tuple[int, ...]) -> Unprojection:
    inverse = np.linalg.pinv(projection.matrix.astype(np.float64)).astype(np.float32)
    return Unprojection(inverse, projection.mean, layers)


def _of_layer(array: np.ndarray, slot: int) -> np.ndarray:
    return array[slot if len(array) > 1 else 0]
