"""The float32 path on the device against two passes of numpy in float64."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from moments_oracle import far_from_zero, scaled_error, two_pass

from analysis.moments import Moments, TokenOrigins
from analysis.moments import device as device_module
from analysis.moments.device import DeviceSums, device_moments, moments_of_device
from core.base.errors import RunError

WIDTH = 24
TARGET = 1e-6


def in_steps(x: np.ndarray, mask: np.ndarray, n_steps: int, **options) -> Moments:
    """x: (B, T, D). The rows of B are dealt to steps."""
    before, norms = None, []
    for rows in np.array_split(np.arange(len(x)), n_steps):
        sums, of_step = device_moments(x[rows], mask[rows], before)
        before = sums
        norms.append(np.asarray(of_step)[mask[rows]])
    return moments_of_device(before, np.concatenate(norms), **options)


def ragged(n_rows: int, length: int, seed: int = 0) -> np.ndarray:
    stops = np.random.default_rng(seed).integers(1, length + 1, n_rows)
    return np.arange(length) < stops[:, None]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sigmas", [100, 1])
def test_the_error_is_within_the_target_with_means_a_hundred_sigmas_away(dtype, sigmas):
    x = far_from_zero(6 * 700, WIDTH, sigmas=sigmas).reshape(6, 700, WIDTH).astype(dtype)
    mask = ragged(6, 700)
    kept = x[mask]
    found, host = in_steps(x, mask, 3), Moments.of(kept)
    mean, scatter = two_pass(kept)
    assert found.count == mask.sum()
    assert scaled_error(found.scatter, scatter) < TARGET
    if sigmas == 100 and x.itemsize == 2:
        assert scaled_error(found.scatter, scatter) < 1e-12, (
            "so far from 0 these dtypes have few values: sums are exact"
        )
    assert (np.abs(found.mean - mean) / host.finish().std).max() < TARGET
    assert found.fourth == pytest.approx(host.fourth, rel=TARGET)
    assert np.linalg.norm(found.cubes - host.cubes) < TARGET * host.fourth**0.75 * host.count**0.25
    np.testing.assert_array_equal(found.extremes.low, host.extremes.low)
    np.testing.assert_array_equal(found.extremes.high, host.extremes.high)
    assert found.norms.total == pytest.approx(host.norms.total, rel=TARGET)


def test_the_error_does_not_grow_with_the_number_of_steps():
    n_steps = 400
    x = far_from_zero(n_steps * 64, 8, seed=4).astype(np.float32)
    mask = np.ones((n_steps, 64), bool)
    found = in_steps(x.reshape(n_steps, 64, 8), mask, n_steps)
    assert scaled_error(found.scatter, two_pass(x)[1]) < 3e-7


def test_squares_of_bfloat16_do_not_round_one_way():
    x = far_from_zero(8 * 1024, 64, sigmas=1.0).reshape(8, 1024, 64).astype(ml_dtypes.bfloat16)
    found = in_steps(x, np.ones((8, 1024), bool), 1)
    assert scaled_error(found.scatter, two_pass(x.reshape(-1, 64))[1]) < 3e-7


def test_massive_values_leave_the_other_dimensions_as_exact():
    x = far_from_zero(4 * 700, WIDTH, seed=5, sigmas=1.0).reshape(4, 700, WIDTH).astype(np.float32)
    x[:, 0, 7] = 27000
    found = in_steps(x, np.ones((4, 700), bool), 2)
    assert scaled_error(found.scatter, two_pass(x.reshape(-1, WIDTH))[1]) < TARGET


def test_a_coarse_default_precision_does_not_leak_in():
    x = jnp.asarray(far_from_zero(2 * 128, WIDTH).reshape(2, 128, WIDTH), jnp.float32)
    mask = jnp.ones((2, 128), bool)
    plain = device_moments(x, mask)
    with jax.default_matmul_precision("bfloat16"):
        coarse = device_moments(x, mask)
        text = jax.jit(device_moments).lower(x, mask).as_text()
    for ours, theirs in zip(jax.tree.leaves(plain), jax.tree.leaves(coarse), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # A CPU computes in float32 whatever it is asked for; a TPU and a GPU do not.
    products = re.findall(r"dot_general.*", text)
    assert len(products) >= 2
    assert all("precision = [HIGHEST, HIGHEST]" in product for product in products)


def test_nothing_outside_of_the_mask_counts_be_it_nan_or_the_first_step():
    x = far_from_zero(6 * 700, WIDTH, seed=6).reshape(6, 700, WIDTH).astype(np.float32)
    mask = ragged(6, 700)
    mask[:2] = False
    x[~mask] = np.nan
    found = in_steps(x, mask, 3)
    assert scaled_error(found.scatter, two_pass(x[mask])[1]) < TARGET
    assert np.isfinite(found.extremes.high).all()


def test_tokens_that_are_not_finite_are_refused_with_their_place():
    x = far_from_zero(2 * 30, WIDTH).reshape(2, 30, WIDTH).astype(np.float32)
    mask = np.ones((2, 30), bool)
    x[1, 4, 2] = np.inf
    samples, positions = np.divmod(np.arange(60), 30)
    origins = TokenOrigins(samples + 5, positions, positions)
    with pytest.raises(RunError, match=r"^sample 6, position 4: values are not finite"):
        in_steps(x, mask, 1, origins=origins)
    x[1, 4] = 0
    x[0, 3] = 1e12
    with pytest.raises(RunError, match=r"magnitude 1\.0e\+12: their fourth powers overflow float32"):
        in_steps(x, mask, 1)
    sums, norms = device_moments(x, mask)
    with pytest.raises(ValueError, match="59 norms of 60 tokens"):
        moments_of_device(sums, np.asarray(norms).reshape(-1)[1:])


def test_the_largest_tokens_are_those_of_the_host():
    x = far_from_zero(6 * 700, WIDTH, seed=7).reshape(6, 700, WIDTH).astype(np.float32)
    mask = ragged(6, 700)
    samples, positions = np.nonzero(mask)
    origins = TokenOrigins(samples, positions, positions * 10)
    found, host = in_steps(x, mask, 3, origins=origins, largest=5), Moments.of(x[mask], origins, largest=5)
    np.testing.assert_array_equal(found.largest.origins.sample, host.largest.origins.sample)
    np.testing.assert_array_equal(found.largest.origins.position, host.largest.origins.position)


def test_a_batch_with_more_rows_than_a_block_has_tokens_is_cut_by_token():
    n_rows = device_module.BLOCK_TOKENS + 44
    x = far_from_zero(n_rows * 3, WIDTH).reshape(n_rows, 3, WIDTH).astype(np.float32)
    found = in_steps(x, np.ones((n_rows, 3), bool), 1)
    assert scaled_error(found.scatter, two_pass(x.reshape(-1, WIDTH))[1]) < TARGET


def test_sums_are_one_pytree_with_float32_leaves():
    sums, _ = device_moments(np.zeros((1, 4, 3), np.float32), np.ones((1, 4), bool))
    assert isinstance(sums, DeviceSums)
    assert {leaf.dtype for leaf in jax.tree.leaves(sums._replace(n_tokens=sums.shift))} == {jnp.dtype("float32")}
