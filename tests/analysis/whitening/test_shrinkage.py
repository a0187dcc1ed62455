"""Shrunk covariances against scikit-learn, from moments in one pass and from merged blocks."""

import numpy as np
import pytest
from sklearn.covariance import OAS, LedoitWolf

from analysis.moments import Moments, merge
from analysis.whitening.shrinkage import estimated_covariance

ESTIMATORS = {"ledoit-wolf": LedoitWolf, "oas": OAS}


def rows(n_rows: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    heavy = rng.standard_t(5, size=(n_rows, width)) @ rng.normal(size=(width, width))
    return heavy * np.geomspace(0.1, 10, width) + 30


def merged(x: np.ndarray) -> Moments:
    parts = [Moments.of(part) for part in np.array_split(x, 7)]
    found = Moments.empty(x.shape[1])
    for part in parts[::-1]:
        found = merge(part, found)
    return found


@pytest.mark.parametrize("shrinkage", list(ESTIMATORS))
@pytest.mark.parametrize(("n_rows", "width"), [(30, 12), (12, 30), (500, 5), (40, 1)])
@pytest.mark.parametrize("of", [Moments.of, merged])
def test_covariance_and_amount_are_scikit_learns(shrinkage, n_rows, width, of):
    x = rows(n_rows, width, seed=n_rows)
    theirs = ESTIMATORS[shrinkage]().fit(x)
    covariance, amount = estimated_covariance(of(x), shrinkage)
    assert amount == pytest.approx(theirs.shrinkage_, rel=1e-10, abs=1e-10)
    np.testing.assert_allclose(covariance, theirs.covariance_, rtol=1e-10, atol=1e-10 * np.abs(covariance).max())


def test_without_shrinkage_it_is_the_unbiased_covariance():
    x = rows(50, 4, seed=1)
    covariance, amount = estimated_covariance(Moments.of(x), "none")
    assert amount == 0
    np.testing.assert_allclose(covariance, np.cov(x.T), rtol=1e-12)
