"""Moments of rows against two passes of numpy in float64; merging in any order."""

import io
import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moments_oracle import far_from_zero, scaled_error, two_pass
from safetensors.numpy import load, save

from analysis.moments import Moments, Norms, TokenOrigins, merge
from analysis.moments import moments as moments_module
from analysis.moments.extremes import outlier_dimensions
from analysis.moments.norms import EDGES
from core.base.errors import RunError

WIDTH = 12
ROWS = far_from_zero(500, WIDTH)


def higher_powers(x: np.ndarray) -> tuple[np.ndarray, float]:
    c = x - x.mean(axis=0)
    squares = np.sum(c * c, axis=1)
    return squares @ c, float(np.sum(squares**2))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_moments_are_those_of_two_passes_in_float64(dtype, monkeypatch):
    monkeypatch.setattr(moments_module, "_BLOCK_ROWS", 64)
    x = ROWS.astype(dtype)
    exact = x.astype(np.float64)
    found = Moments.of(x)
    mean, scatter = two_pass(x)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-14)
    assert scaled_error(found.scatter, scatter) < 1e-14
    np.testing.assert_array_equal(found.scatter, found.scatter.T)
    cubes, fourth = higher_powers(exact)
    assert found.fourth == pytest.approx(fourth, rel=1e-12)
    assert np.linalg.norm(found.cubes - cubes) < 1e-11 * fourth**0.75 * len(x) ** 0.25
    lengths = np.linalg.norm(exact, axis=1)
    assert found.norms.mean == pytest.approx(lengths.mean(), rel=1e-14)
    assert (found.norms.least, found.norms.greatest) == pytest.approx((lengths.min(), lengths.max()), rel=1e-15)
    np.testing.assert_array_equal(found.extremes.low, exact.min(axis=0))
    np.testing.assert_array_equal(found.extremes.high, exact.max(axis=0))


def test_what_is_finished_is_numpys_covariance_and_correlation():
    x = ROWS.copy()
    x[:, 3] = 7
    found = Moments.of(x)
    statistics = found.finish()
    np.testing.assert_allclose(statistics.covariance, np.cov(x.T), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.finish(ddof=0).covariance, np.cov(x.T, ddof=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(statistics.std, x.std(axis=0, ddof=1), rtol=1e-12)
    varies = np.arange(WIDTH) != 3
    np.testing.assert_allclose(
        statistics.correlation[np.ix_(varies, varies)], np.corrcoef(x[:, varies].T), rtol=1e-10, atol=1e-12
    )
    assert not statistics.correlation[3].any()
    assert statistics.mean_norm == pytest.approx(np.linalg.norm(x.mean(axis=0)))
    with pytest.raises(ValueError, match="more than 1 rows"):
        Moments.of(x[:1]).finish()


def merged_in_some_order(parts: list[Moments], draw) -> Moments:
    """Merges two of what is left, drawn anew each time, until one is left: any order and any grouping."""
    left = list(parts)
    while len(left) > 1:
        first = left.pop(draw(st.integers(0, len(left) - 1)))
        left.append(merge(first, left.pop(draw(st.integers(0, len(left) - 1)))))
    return left[0]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_order_and_no_grouping_of_merges_changes_anything_beyond_rounding(data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ROWS)), max_size=8)))
    origins = TokenOrigins.of_rows(len(ROWS))
    spans = [slice(start, stop) for start, stop in zip([0, *cuts], [*cuts, len(ROWS)], strict=True)]
    whole = Moments.of(ROWS)
    found = merged_in_some_order([Moments.of(ROWS[span], origins.taken(span)) for span in spans], data.draw)
    assert found.count == whole.count
    assert scaled_error(found.scatter, whole.scatter) < 1e-12
    np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-13)
    assert found.fourth == pytest.approx(whole.fourth, rel=1e-12)
    assert np.linalg.norm(found.cubes - whole.cubes) < 1e-12 * whole.fourth**0.75 * whole.count**0.25
    np.testing.assert_array_equal(found.norms.histogram, whole.norms.histogram)
    np.testing.assert_array_equal(found.largest.origins.sample, whole.largest.origins.sample)
    np.testing.assert_array_equal(found.extremes.low, whole.extremes.low)
    np.testing.assert_array_equal(found.extremes.high, whole.extremes.high)


def test_blocks_with_means_far_apart_merge_to_the_moments_of_both():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(40, 5)) ** 2 + 30, rng.normal(size=(17, 5)) ** 3 - 20
    both = np.concatenate([a, b])
    found = merge(Moments.of(a), Moments.of(b))
    cubes, fourth = higher_powers(both)
    assert scaled_error(found.scatter, two_pass(both)[1]) < 1e-14
    np.testing.assert_allclose(found.cubes, cubes, rtol=1e-11)
    assert found.fourth == pytest.approx(fourth, rel=1e-13)


def test_merging_with_no_rows_changes_no_bit_and_neither_side_is_changed():
    one = Moments.of(ROWS[:30])
    before = {name: array.copy() for name, array in one.to_arrays().items()}
    for found in (merge(one, Moments.empty(WIDTH)), merge(Moments.empty(WIDTH), one), one):
        merge(one, Moments.of(ROWS[30:]))
        for name, array in found.to_arrays().items():
            np.testing.assert_array_equal(array, before[name], err_msg=name)
    with pytest.raises(ValueError, match="rows of 12 and of 3 values"):
        merge(one, Moments.empty(3))


def test_every_bit_returns_from_arrays_and_from_files():
    found = Moments.of(ROWS[:77].astype(np.float32))
    arrays = found.to_arrays("residual/14/") | Moments.of(ROWS[:, :3]).to_arrays("residual/7/")
    assert {"residual/14/count", "residual/14/mean", "residual/14/scatter"} < arrays.keys()
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    stream.seek(0)
    for read in (arrays, load(save(arrays)), dict(np.load(stream))):
        again = Moments.from_arrays(read, "residual/14/").to_arrays()
        assert {name: array.tobytes() for name, array in again.items()} == {
            name: array.tobytes() for name, array in found.to_arrays().items()
        }
    finished = found.finish().to_arrays("residual/14/")
    assert {"residual/14/count", "residual/14/mean", "residual/14/covariance"} < finished.keys()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_refused_with_its_place(value, monkeypatch):
    monkeypatch.setattr(moments_module, "_BLOCK_ROWS", 8)
    x = ROWS[:20].astype(np.float32)
    x[11, 4] = value
    places = np.arange(20)
    with pytest.raises(RunError, match=rf"^sample 111, position 11, dimension 4: {value}: no statistics") as refused:
        Moments.of(x, TokenOrigins(places + 100, places, places))
    assert "\n" not in str(refused.value)
    with pytest.raises(RunError, match=r"magnitude 1\.0e\+80: their fourth powers overflow"):
        Moments.of(np.array([[1e80], [-1e80]]))


def test_the_bin_of_a_norm_is_between_its_edges_and_quantiles_are_within_one_bin():
    lengths = np.concatenate([[0.0], EDGES, np.random.default_rng(2).lognormal(1, 2, 2000), [1e9]])
    norms = Norms.of(lengths)
    assert norms.histogram.sum() == len(lengths)
    assert norms.histogram[0] >= 1
    assert Norms.of(EDGES[[7]]).histogram.nonzero()[0] == [8], "a bin begins with its lower edge"
    for place in (1, 80, len(EDGES) - 1):
        is_inside = (EDGES[place - 1] <= lengths) & (lengths < EDGES[place])
        assert norms.histogram[place] == is_inside.sum() >= 1
    for share in (0, 0.01, 0.5, 0.99, 1):
        low, high = norms.quantile(share)
        assert low <= np.quantile(lengths, share, method="inverted_cdf") <= high
    assert norms.median == pytest.approx(np.median(lengths), rel=0.1)
    assert math.isnan(Norms.of(np.zeros(0)).median)


def test_the_largest_tokens_are_known_by_their_place_and_ties_by_the_earlier_one():
    x = np.ones((50, 4))
    x[[7, 30]] = 9
    ids = np.arange(50)
    found = Moments.of(x, TokenOrigins(ids // 10, ids % 10, ids + 1000), largest=4).largest
    assert found.to_json() == [
        {"norm": 18.0, "sample_idx": 0, "position": 7, "token_id": 1007},
        {"norm": 18.0, "sample_idx": 3, "position": 0, "token_id": 1030},
        {"norm": 2.0, "sample_idx": 0, "position": 0, "token_id": 1000},
        {"norm": 2.0, "sample_idx": 0, "position": 1, "token_id": 1001},
    ]
    assert Moments.of(x, largest=0).largest.to_json() == []


def test_outlier_dimensions_are_multiples_of_the_median_dimension():
    peaks, variances = np.full(20, 2.0), np.full(20, 0.5)
    peaks[3], variances[3] = 2000.0, 1.0
    variances[11] = 50.0
    found = outlier_dimensions(peaks, variances, factor=20)
    assert [(one.dimension, one.peak_ratio, one.variance_ratio) for one in found] == [(3, 1000, 2), (11, 1, 100)]
    assert outlier_dimensions(np.zeros(4), np.zeros(4)) == ()
    assert outlier_dimensions(np.eye(4)[0], np.zeros(4))[0].peak_ratio == math.inf


def test_the_summary_is_json_without_infinity_and_names_what_stands_out():
    x = np.random.default_rng(3).normal(size=(200, 32))
    x[5, 9] = 27000
    summary = Moments.of(x, largest=2).finish().summary()
    again = json.loads(json.dumps(summary, allow_nan=False))
    assert again["count"] == 200
    assert [one["dimension"] for one in again["outlier_dimensions"]] == [9]
    assert again["largest_tokens"][0] == {"norm": 27000.0, "sample_idx": 5, "position": 0, "token_id": -1}
    low, high = again["norm"]["median_between"]
    assert low <= np.median(np.linalg.norm(x, axis=1)) <= high
    lonely = np.zeros((30, 3))
    lonely[4, 1] = 5
    (outlier,) = json.loads(json.dumps(Moments.of(lonely).finish().summary(), allow_nan=False))["outlier_dimensions"]
    assert outlier["dimension"] == 1
    assert outlier["peak_ratio"] is None, "the median dimension is 0"
