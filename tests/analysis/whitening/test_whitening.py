"""Whitening by each method against its definition and scikit-learn; floors, ranks, signs."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from analysis.moments import Moments, merge
from analysis.whitening import METHODS, SHRINKAGES, Whitening, WhiteningSettings
from analysis.whitening.shrinkage import estimated_covariance
from analysis.whitening.spectrum import Spectrum
from core.base.errors import RunError, UsageError

WIDTH = 20


def rows(n_rows: int = 400, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n_rows, width)) @ rng.normal(size=(width, width))
    return (mixed + 50) * np.geomspace(0.3, 30, width)


X = rows()
MOMENTS = Moments.of(X)


@pytest.mark.parametrize("method", METHODS)
def test_the_covariance_of_whitened_rows_is_the_identity_and_inverting_returns_them(method):
    whitening = Whitening.fit(MOMENTS, WhiteningSettings(method))
    z = whitening.apply(X, np.float64)
    np.testing.assert_allclose(np.cov(z.T), np.eye(WIDTH), atol=1e-9)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(whitening.invert(z, np.float64), X, rtol=1e-9)
    check = whitening.check(MOMENTS)
    assert max(check.max_error, check.kept_error) < 1e-9
    assert (check.rank, check.width, check.rank_limit) == (WIDTH, WIDTH, WIDTH)
    assert (whitening.n_samples, whitening.rank, whitening.kept) == (400, WIDTH, WIDTH)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compute_dtype", [np.float32, np.float64])
def test_float32_stays_within_1e_5_of_the_identity(method, compute_dtype):
    whitening = Whitening.fit(MOMENTS, WhiteningSettings(method))
    z = whitening.apply(X.astype(np.float32).reshape(20, 20, WIDTH), compute_dtype=compute_dtype)
    assert (z.dtype, z.shape) == (np.float32, (20, 20, WIDTH))
    assert np.abs(np.cov(z.reshape(-1, WIDTH).T.astype(np.float64)) - np.eye(WIDTH)).max() < 1e-5
    restored = whitening.invert(z)
    assert restored.dtype == np.float32
    np.testing.assert_allclose(restored.reshape(-1, WIDTH), X, rtol=1e-4)


def test_each_method_is_what_kessy_lewin_and_strimmer_define():
    covariance, std = np.cov(X.T), X.std(axis=0, ddof=1)
    w = {method: Whitening.fit(MOMENTS, WhiteningSettings(method)).transform.T for method in METHODS}
    precision = np.linalg.inv(covariance)
    for method, matrix in w.items():
        np.testing.assert_allclose(matrix.T @ matrix, precision, rtol=1e-6, atol=1e-9, err_msg=method)
    np.testing.assert_allclose(w["zca"], w["zca"].T, atol=1e-9)
    assert (np.linalg.eigvalsh(w["zca"]) > 0).all()
    assert not np.tril(w["cholesky"], -1).any(), "W is L^T"
    assert (np.diag(w["cholesky"]) > 0).all()
    in_correlation = w["zca-cor"] * std
    np.testing.assert_allclose(in_correlation, in_correlation.T, atol=1e-9)
    assert (np.linalg.eigvalsh(in_correlation) > 0).all()
    directions = w["pca"] / np.linalg.norm(w["pca"], axis=1, keepdims=True)
    np.testing.assert_allclose(directions @ directions.T, np.eye(WIDTH), atol=1e-9)
    turned = w["pca-cor"] * std
    turned /= np.linalg.norm(turned, axis=1, keepdims=True)
    np.testing.assert_allclose(turned @ turned.T, np.eye(WIDTH), atol=1e-9)


def test_pca_is_scikit_learns_with_deterministic_signs_and_a_cut():
    theirs = PCA(n_components=7, whiten=True).fit(X)
    whitening = Whitening.fit(MOMENTS, WhiteningSettings("pca", n_components=7))
    z, expected = whitening.apply(X, np.float64), theirs.transform(X)
    signs = np.sign(np.sum(z * expected, axis=0))
    np.testing.assert_allclose(z, expected * signs, atol=1e-8)
    np.testing.assert_allclose(
        whitening.invert(z, np.float64), theirs.inverse_transform(expected), rtol=1e-8, atol=1e-6
    )
    largest = np.argmax(np.abs(whitening.transform), axis=0)
    assert (whitening.transform[largest, np.arange(7)] > 0).all()
    assert whitening.check(MOMENTS).max_error < 1e-9
    assert (whitening.kept, whitening.rank) == (7, WIDTH)


def test_eigenvectors_do_not_depend_on_the_sign_that_lapack_gives(monkeypatch):
    covariance = np.cov(X.T)
    plain = Spectrum.of(covariance, WhiteningSettings())
    eigh = np.linalg.eigh

    def negated(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * np.where(np.arange(WIDTH) % 2, -1, 1)

    monkeypatch.setattr(np.linalg, "eigh", negated)
    np.testing.assert_array_equal(Spectrum.of(covariance, WhiteningSettings()).vectors, plain.vectors)


FEW = rows(12, seed=3)


@pytest.mark.parametrize("method", ["pca", "pca-cor", "zca", "zca-cor"])
def test_directions_below_the_floor_are_dropped(method):
    moments = Moments.of(FEW)
    whitening = Whitening.fit(moments, WhiteningSettings(method))
    check = whitening.check(moments)
    assert (whitening.rank, check.rank, check.rank_limit) == (11, 11, 11)
    assert check.kept_error < 1e-8
    is_rotated_back = method.startswith("zca")
    assert whitening.kept == (WIDTH if is_rotated_back else 11)
    assert check.max_error == pytest.approx(1, abs=0.9) if is_rotated_back else check.max_error < 1e-8
    np.testing.assert_allclose(whitening.invert(whitening.apply(FEW, np.float64), np.float64), FEW, rtol=1e-7)
    # What lies in a dropped direction is gone: a row far away returns as the nearest of the kept ones.
    once = whitening.invert(whitening.apply(X[:5], np.float64), np.float64)
    twice = whitening.invert(whitening.apply(once, np.float64), np.float64)
    np.testing.assert_allclose(once, twice, rtol=1e-6, atol=1e-6)
    assert np.abs(once - X[:5]).max() > 1


@pytest.mark.parametrize("method", METHODS)
def test_directions_below_the_floor_are_floored_and_everything_can_be_inverted(method):
    moments = Moments.of(FEW)
    whitening = Whitening.fit(moments, WhiteningSettings(method, floor=1e-4, below="floor"))
    check = whitening.check(moments)
    assert whitening.kept == WIDTH
    assert whitening.rank <= 11
    assert check.kept_error < 1e-6
    assert check.max_error <= 1 + 1e-6
    np.testing.assert_allclose(whitening.invert(whitening.apply(X, np.float64), np.float64), X, rtol=1e-6, atol=1e-6)


def test_a_dimension_that_never_varies_is_dropped_and_restored_as_its_mean():
    x = X.copy()
    x[:, 4] = 3.5
    for method in ("pca", "zca", "pca-cor", "zca-cor"):
        whitening = Whitening.fit(Moments.of(x), WhiteningSettings(method))
        assert whitening.rank == WIDTH - 1
        np.testing.assert_allclose(whitening.invert(whitening.apply(x, np.float64), np.float64), x, rtol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ica"}, "method 'ica': expected one of pca, zca"),
        ({"shrinkage": "lw"}, "shrinkage 'lw': expected one of none"),
        ({"below": "keep"}, "below 'keep': expected one of drop"),
        ({"floor": 0.0}, "floor 0.0: expected a share"),
        ({"floor": float("nan")}, "floor nan: expected a share"),
        ({"n_components": 0}, "to 0 components"),
        ({"method": "zca", "n_components": 3}, "zca has no components to keep 3 of"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(settings, message):
    with pytest.raises(UsageError, match=message) as refused:
        WhiteningSettings(**settings)
    assert "\n" not in str(refused.value)


def test_what_cannot_be_whitened_is_refused_in_one_line():
    with pytest.raises(UsageError, match="21 components: rows have only 20 values"):
        Whitening.fit(MOMENTS, WhiteningSettings(n_components=21))
    with pytest.raises(UsageError, match="cholesky needs all 20 directions and 9 are below the floor"):
        Whitening.fit(Moments.of(FEW), WhiteningSettings("cholesky"))
    for x in (X[:1], np.ones((5, 3)), np.zeros((0, 4))):
        with pytest.raises(RunError, match=f"{len(x)} rows of {x.shape[1]} values do not vary"):
            Whitening.fit(Moments.of(x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shrinkage", SHRINKAGES[1:])
def test_a_shrunk_whitening_whitens_the_shrunk_covariance(method, shrinkage):
    moments = Moments.of(FEW)
    whitening = Whitening.fit(moments, WhiteningSettings(method, shrinkage))
    covariance, amount = estimated_covariance(moments, shrinkage)
    assert 0 < amount < 1
    assert whitening.shrinkage_amount == amount
    assert whitening.rank == WIDTH, "shrinking leaves no direction without variance"
    found = whitening.transform.T @ covariance @ whitening.transform
    np.testing.assert_allclose(found, np.eye(WIDTH), atol=1e-9)


def test_merged_moments_whiten_as_those_of_all_rows():
    merged = merge(merge(Moments.of(X[300:]), Moments.of(X[:37])), Moments.of(X[37:300]))
    for shrinkage in SHRINKAGES:
        settings = WhiteningSettings("zca", shrinkage)
        one, other = Whitening.fit(merged, settings), Whitening.fit(MOMENTS, settings)
        np.testing.assert_allclose(one.transform, other.transform, rtol=1e-7, atol=1e-9)
