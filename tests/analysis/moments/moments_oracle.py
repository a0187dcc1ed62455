"""Two passes of numpy in float64, and data that is hard for anything else."""

import numpy as np


def far_from_zero(n_rows: int, width: int, seed: int = 0, *, sigmas: float = 100.0) -> np.ndarray:
    """Correlated rows whose dimensions have scales of 0.1 to 10 and means `sigmas` standard deviations from 0."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n_rows, width)) @ rng.normal(size=(width, width)) / np.sqrt(width)
    return (rows + sigmas * rng.choice([-1, 1], width)) * np.geomspace(0.1, 10, width)


def two_pass(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sum of c c^T."""
    x = x.astype(np.float64)
    c = x - x.mean(axis=0)
    return x.mean(axis=0), c.T @ c


def scaled_error(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest |found_ij - exact_ij| / sqrt(exact_ii exact_jj)."""
    scale = np.sqrt(np.diag(exact))
    return float((np.abs(found - exact) / np.outer(scale, scale)).max())
