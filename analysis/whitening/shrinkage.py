"""Estimates of the covariance: as it is, or shrunk towards a multiple of the identity.

Axis letters: D width of a row.
"""

import numpy as np
from jaxtyping import Float64

from analysis.moments import Moments
from core.base.errors import RunError


def estimated_covariance(moments: Moments, shrinkage: str) -> tuple[Float64[np.ndarray, "D D"], float]:
    """The covariance, and the amount of shrinkage rho in (1 - rho) S + rho (tr S / D) I.

    none: scatter / (n - 1), rho 0. ledoit-wolf and oas: S = scatter / n, as they are defined.
    Raises RunError with fewer than two rows, or if no dimension varies.
    """
    if moments.count < 2 or not np.trace(moments.scatter) > 0:
        raise RunError(f"{moments.count} rows of {moments.width} values do not vary: there is nothing to whiten")
    if shrinkage == "none":
        return moments.scatter / (moments.count - 1), 0.0
    covariance = moments.scatter / moments.count
    amount = _ledoit_wolf(moments, covariance) if shrinkage == "ledoit-wolf" else _oas(moments.count, covariance)
    shrunk = (1 - amount) * covariance
    shrunk[np.diag_indices(moments.width)] += amount * np.trace(covariance) / moments.width
    return shrunk, amount


def _ledoit_wolf(moments: Moments, covariance: Float64[np.ndarray, "D D"]) -> float:
    """Ledoit and Wolf, A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices (2004), lemmas 3.2-3.4.

    The paper's b is the mean of |c c^T - S|^2 over the rows, over n: (fourth / n - |S|^2) / n.
    """
    width, mean_variance = moments.width, np.trace(covariance) / moments.width
    squares = float(np.sum(covariance * covariance))
    distance = squares - width * mean_variance**2
    error = (moments.fourth / moments.count - squares) / moments.count
    return float(min(max(error, 0.0), distance) / distance) if distance > 0 else 0.0


def _oas(count: int, covariance: Float64[np.ndarray, "D D"]) -> float:
    """Oracle approximating shrinkage, as in scikit-learn.

    Chen et al., Shrinkage Algorithms for MMSE Covariance Estimation (2010), equation 23, has terms in 2 / D besides,
    which vanish for wide rows.
    """
    width, trace = len(covariance), float(np.trace(covariance))
    squares = float(np.sum(covariance * covariance))
    distance = (count + 1) * (squares - trace**2 / width)
    return min(1.0, (squares + trace**2) / distance) if distance > 0 else 1.0
