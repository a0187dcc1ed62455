"""The matrices of each method, by Kessy, Lewin and Strimmer, Optimal Whitening and Decorrelation (2018), table 1.

Rows are whitened from the right, z = (x - mean) @ transform, so `transform` is the paper's W transposed.
Axis letters: D width of a row, K width of a whitened row.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from analysis.whitening.settings import WhiteningSettings
from analysis.whitening.spectrum import Spectrum
from core.base.errors import UsageError


class Transforms(NamedTuple):
    """transform @ inverse is the identity, or the projection on the kept directions. rank: of `Spectrum`."""

    transform: Float64[np.ndarray, "D K"]
    inverse: Float64[np.ndarray, "K D"]
    rank: int


def transforms_of(covariance: Float64[np.ndarray, "D D"], settings: WhiteningSettings) -> Transforms:
    """Both matrices. Raises UsageError for cholesky where directions are dropped, which it cannot do."""
    std = np.sqrt(np.diag(covariance)) if settings.uses_correlation else np.ones(len(covariance))
    scale = np.where(std > 0, 1 / np.where(std > 0, std, 1), 0)
    spectrum = Spectrum.of(covariance * scale[:, None] * scale, settings)
    if settings.method == "cholesky":
        return _cholesky(covariance, spectrum)
    root = np.sqrt(spectrum.values)
    transform, inverse = spectrum.vectors / root, (spectrum.vectors * root).T
    if settings.method.startswith("zca"):
        transform, inverse = transform @ spectrum.vectors.T, spectrum.vectors @ inverse
    return Transforms(scale[:, None] * transform, inverse * std, spectrum.rank)


def _cholesky(covariance: Float64[np.ndarray, "D D"], spectrum: Spectrum) -> Transforms:
    """transform is L of covariance^-1 = L L^T: that of an upper R with covariance = R R^T, inverted and transposed."""
    width, kept = spectrum.vectors.shape
    if kept < width:
        raise UsageError(
            f"cholesky needs all {width} directions and {width - kept} are below the floor: "
            "choose below='floor', a shrinkage or another method"
        )
    if spectrum.rank < width:
        covariance = (spectrum.vectors * spectrum.values) @ spectrum.vectors.T
    upper = np.linalg.cholesky(covariance[::-1, ::-1])[::-1, ::-1]
    return Transforms(np.triu(np.linalg.inv(upper)).T, upper.T.copy(), spectrum.rank)
