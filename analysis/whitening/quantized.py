"""Whitened rows as int8 codes with a scale for each block of values, by the arithmetic of `--quantize`.

Axis letters: N rows, K values of a row, G blocks of a row.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int8

from core.reduce.arithmetic import quantize
from core.reduce.losses import RELATIVE_L2, WORST_COSINE
from core.reduce.reductions import SCALE, VALUES, Quantization, restore

DEFAULT_BLOCK = 32


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """A value is its code times the scale of its block of `block` neighbouring values; 0: of its row.

    A value is at most half a scale away, and a scale is the largest magnitude of its block over 127.
    """

    codes: Int8[np.ndarray, "N K"]
    scale: Float32[np.ndarray, "N G"]
    block: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def restored(self) -> Float32[np.ndarray, "N K"]:
        """The rows that the codes stand for."""
        return restore({VALUES: self.codes, SCALE: self.scale}, self.codes.shape[1], self.block)

    def losses(self, rows: Float[np.ndarray, "N K"]) -> dict[str, float]:
        """`relative_l2`, the mean over the rows of |row - restored| / |row|, and the worst cosine between the two."""
        exact, found = rows.astype(np.float64), self.restored().astype(np.float64)
        lengths = np.linalg.norm(exact, axis=1)
        errors = np.linalg.norm(exact - found, axis=1)[lengths > 0] / lengths[lengths > 0]
        products = lengths * np.linalg.norm(found, axis=1)
        cosines = np.einsum("nk,nk->n", exact, found)[products > 0] / products[products > 0]
        return {RELATIVE_L2: float(errors.mean()), WORST_COSINE: float(cosines.min())} if len(errors) else {}


def quantize_rows(rows: Float[np.ndarray, "N K"], block: int = DEFAULT_BLOCK) -> QuantizedRows:
    """int8 codes of rows, computed in float32. block: how many values share a scale; 0 for a whole row."""
    codes, scale, _ = quantize(jnp.asarray(rows, jnp.float32), Quantization("int8", block))
    return QuantizedRows(np.asarray(codes), np.asarray(scale), block)
