"""Reconstruction error of quantized or top-k rows, of one window and of several.

Axis letters: L stored layers of a site, B rows of a step.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32

RELATIVE_L2, WORST_COSINE = "relative_l2", "worst_cosine"
Losses = dict[str, dict[str, dict[str, float]]]
"""Site → layer → the mean over the rows of |row - restored| / |row|, and the least cosine between the two."""
_DIGITS = 6


@dataclass
class LossSum:
    """The sum of the losses of a window's steps, see `core.reduce.arithmetic.ReducedSite`."""

    _sums: dict[str, np.ndarray] = field(default_factory=dict)
    _worst: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, of_step: Mapping[str, Float32[np.ndarray, "L B 2"]]) -> None:
        """Adds the losses of one step."""
        for site, losses in of_step.items():
            total, worst = losses[..., 0].sum(axis=1, dtype=np.float64), losses[..., 1].min(axis=1)
            self._sums[site] = self._sums.get(site, 0) + total
            self._worst[site] = np.minimum(self._worst.get(site, 1), worst)

    def of_rows(self, n_rows: int, layers: Mapping[str, tuple[int, ...]]) -> Losses:
        """The losses of the window's `n_rows` rows; empty without rows."""
        if not n_rows:
            return {}
        return {
            site: {
                str(layer): {RELATIVE_L2: _rounded(total / n_rows), WORST_COSINE: _rounded(worst)}
                for layer, total, worst in zip(layers[site], self._sums[site], self._worst[site], strict=True)
            }
            for site in self._sums
        }


def _rounded(value: float) -> float:
    """Rounded, because the last bits differ between kinds of hardware."""
    return float(f"{value:.{_DIGITS}g}")


def total_losses(windows: Iterable[tuple[int, Losses]]) -> Losses:
    """The losses of several windows, given the number of rows and the losses of each."""
    sums: dict[tuple[str, str], tuple[int, float, float]] = {}
    for n_rows, losses in windows:
        for site, layers in losses.items():
            for layer, figures in layers.items():
                rows, total, worst = sums.get((site, layer), (0, 0.0, 1.0))
                total += n_rows * figures[RELATIVE_L2]
                sums[site, layer] = rows + n_rows, total, min(worst, figures[WORST_COSINE])
    found: Losses = {}
    for (site, layer), (rows, total, worst) in sums.items():
        found.setdefault(site, {})[layer] = {RELATIVE_L2: _rounded(total / rows), WORST_COSINE: worst}
    return found


def is_losses(value: Any) -> bool:
    """Whether JSON has the shape of `Losses`."""
    return isinstance(value, dict) and all(
        isinstance(layers, dict) and all(map(_is_figures, layers.values())) for layers in value.values()
    )


def _is_figures(value: Any) -> bool:
    names = {RELATIVE_L2, WORST_COSINE}
    return isinstance(value, dict) and value.keys() == names and all(type(v) in (int, float) for v in value.values())
