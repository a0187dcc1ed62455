"""Statistics and whitening of real residuals: SmolLM2 over the license of this project, attention sinks included."""

from pathlib import Path

import numpy as np
import pytest

from analysis.moments import Moments, TokenOrigins
from analysis.moments.device import device_moments, moments_of_device
from analysis.whitening import IncrementalWhitener, Whitening, WhiteningSettings, quantize_rows
from extract_activations import capture
from qwen2_jax import load_tokenizer

LAYER, LENGTH, SAMPLES, WIDTH = 14, 128, 12, 576
LICENSE = Path(__file__).parents[3] / "LICENSE"


@pytest.fixture(scope="module")
def residuals(smollm2) -> np.ndarray:
    """(SAMPLES, LENGTH, WIDTH), float32."""
    ids = np.array(load_tokenizer(str(smollm2)).encode(LICENSE.read_text()))[: SAMPLES * LENGTH]
    found = capture(str(smollm2), list(ids.reshape(SAMPLES, LENGTH)), layers=LAYER, batch_size=6)
    return np.stack(found["residual"][LAYER])


def scaled(error: np.ndarray, covariance: np.ndarray) -> float:
    std = np.sqrt(np.diag(covariance))
    return float((np.abs(error) / np.outer(std, std)).max())


def test_both_paths_are_within_their_targets_with_first_tokens_of_27000(residuals):
    rows = residuals.reshape(-1, WIDTH)
    exact = np.cov(rows.T.astype(np.float64))
    samples, positions = np.divmod(np.arange(len(rows)), LENGTH)
    origins = TokenOrigins(samples, positions, positions)
    host = Moments.of(rows, origins, largest=8)
    assert scaled(host.finish().covariance - exact, exact) < 1e-13
    before, norms = None, []
    for step in np.split(residuals, 2):
        before, of_step = device_moments(step, np.ones(step.shape[:2], bool), before)
        norms.append(np.asarray(of_step).reshape(-1))
    device = moments_of_device(before, np.concatenate(norms), origins, largest=8)
    assert scaled(device.finish().covariance - exact, exact) < 1e-6
    for found in (host, device):
        summary = found.finish().summary()
        assert summary["norm"]["max"] > 20_000 > 100 * summary["norm"]["median_between"][1]
        assert {token["position"] for token in summary["largest_tokens"]} == {0}
        massive, *others = summary["outlier_dimensions"]
        assert massive["peak"] > 20_000
        assert len(others) < 60


@pytest.mark.parametrize(("with_sinks", "method"), [(True, "pca"), (True, "cholesky"), (False, "zca")])
def test_whitened_tokens_are_as_exact_as_they_should_be_also_held_out(residuals, method, with_sinks):
    kept = residuals if with_sinks else residuals[:, 1:]
    fit, held_out = (Moments.of(part.reshape(-1, WIDTH)) for part in (kept[::2], kept[1::2]))
    whitening = Whitening.fit(fit, WhiteningSettings(method, floor=1e-12))
    assert (whitening.rank, whitening.kept) == (WIDTH, WIDTH)
    assert whitening.check(fit).max_error < 1e-8
    exact = whitening.transform.T @ held_out.finish().covariance @ whitening.transform

    def error(compute_dtype: type) -> float:
        z = whitening.apply(kept[1::2], compute_dtype=compute_dtype).reshape(-1, WIDTH)
        return scaled(np.cov(z.T.astype(np.float64)) - exact, exact)

    assert error(np.float64) < 1e-6
    assert error(np.float32) < (2e-5 if with_sinks else 1e-6)


def test_it_whitens_tokens_that_it_was_made_from(residuals):
    rows = residuals.reshape(-1, WIDTH)
    z = Whitening.fit(Moments.of(rows), WhiteningSettings("zca", floor=1e-12)).apply(rows)
    assert np.abs(np.cov(z.T.astype(np.float64)) - np.eye(WIDTH)).max() < 1e-6


def test_the_incremental_whitener_leaves_out_what_the_model_puts_first(residuals):
    whitener = IncrementalWhitener(WhiteningSettings("zca", "ledoit-wolf"), exclude=("pad", "first"))
    mask = np.ones(residuals.shape[:2], bool)
    for batch, of_batch in zip(np.split(residuals, 4), np.split(mask, 4), strict=True):
        whitener.update(batch, of_batch)
    whitener.finalize()
    assert whitener.moments.count == SAMPLES * (LENGTH - 1)
    z = whitener.transform(residuals, mask)
    assert not z[:, 0].any()
    direct = Whitening.fit(Moments.of(residuals[:, 1:].reshape(-1, WIDTH)), whitener.settings)
    np.testing.assert_allclose(z[:, 1:], direct.apply(residuals[:, 1:]), atol=1e-4)


def test_int8_of_whitened_tokens_loses_about_one_percent(residuals):
    rows = residuals[:, 1:].reshape(-1, WIDTH)
    z = Whitening.fit(Moments.of(rows), WhiteningSettings("zca", "ledoit-wolf")).apply(rows)
    losses = quantize_rows(z).losses(z)
    assert losses["relative_l2"] < 0.012
    assert losses["worst_cosine"] > 0.999
