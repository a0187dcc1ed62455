"""A coder of whitened rows, folded: the same features and the same output on raw rows."""

import numpy as np
import pytest

from analysis.moments import Moments
from analysis.whitening import CoderWeights, Whitening, WhiteningSettings, fold_whitening

WIDTH, FEATURES = 16, 40


def topk(x: np.ndarray) -> np.ndarray:
    least = np.sort(x, axis=1)[:, -5, None]
    return np.where(x >= least, np.maximum(x, 0), 0)


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "jumprelu": lambda x: np.where(x > 0.7, x, 0),
    "topk": topk,
    "linear": lambda x: x,
}


def run(weights: CoderWeights, x: np.ndarray, activation: str, subtracts: bool) -> tuple[np.ndarray, np.ndarray]:
    features = ACTIVATIONS[activation]((x - subtracts * weights.b_dec) @ weights.W_enc + weights.b_enc)
    return features, features @ weights.W_dec + weights.b_dec


def coder(width: int, dtype: type) -> CoderWeights:
    rng = np.random.default_rng(1)
    shapes = (width, FEATURES), (FEATURES,), (FEATURES, width), (width,)
    return CoderWeights(*((rng.normal(size=shape) / np.sqrt(width)).astype(dtype) for shape in shapes))


def rows() -> np.ndarray:
    rng = np.random.default_rng(2)
    return rng.normal(size=(300, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH)) + rng.normal(size=WIDTH) * 5


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("settings", [{"method": "pca"}, {"method": "zca"}, {"method": "pca", "n_components": 6}])
def test_folded_features_and_output_are_those_of_whitened_rows(settings, activation, subtracts):
    x = rows()
    whitening = Whitening.fit(Moments.of(x), WhiteningSettings(**settings))
    weights = coder(whitening.kept, np.float64)
    features, output = run(weights, whitening.apply(x, np.float64), activation, subtracts)
    folded = fold_whitening(whitening, weights, subtracts_b_dec=subtracts)
    of_folded, folded_output = run(folded, x, activation, subtracts)
    np.testing.assert_allclose(of_folded, features, atol=1e-10)
    np.testing.assert_allclose(folded_output, whitening.invert(output, np.float64), atol=1e-9)


@pytest.mark.parametrize("subtracts", [True, False])
def test_float32_weights_fold_to_within_1e_5(subtracts):
    x = rows().astype(np.float32)
    whitening = Whitening.fit(Moments.of(x), WhiteningSettings("zca"))
    weights = coder(WIDTH, np.float32)
    features, output = run(weights, whitening.apply(x), "relu", subtracts)
    folded = fold_whitening(whitening, weights, subtracts_b_dec=subtracts)
    assert {array.dtype for array in folded} == {np.dtype(np.float32)}
    of_folded, folded_output = run(folded, x, "relu", subtracts)
    expected = whitening.invert(output)
    assert np.linalg.norm(of_folded - features) < 1e-5 * np.linalg.norm(features)
    assert np.linalg.norm(folded_output - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("method", ["pca", "zca"])
def test_what_b_dec_has_in_dropped_directions_goes_into_the_encoder(method):
    x = rows()[:9]
    whitening = Whitening.fit(Moments.of(x), WhiteningSettings(method))
    assert whitening.rank == 8
    weights = coder(whitening.kept, np.float64)
    features, output = run(weights, whitening.apply(x, np.float64), "relu", True)
    of_folded, folded_output = run(fold_whitening(whitening, weights, subtracts_b_dec=True), x, "relu", True)
    np.testing.assert_allclose(of_folded, features, atol=1e-8)
    np.testing.assert_allclose(folded_output, whitening.invert(output, np.float64), atol=1e-8)
