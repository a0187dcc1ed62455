"""The arithmetic of reductions against numpy in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from core.reduce.arithmetic import StepRows, quantize, reduce_site
from core.reduce.losses import LossSum, total_losses
from core.reduce.pooling import fetch_rows
from core.reduce.reductions import Pool, Quantization, Reduction, parse_pool, restore
from core.samples.windows import TokenizedSample
from core.step.layout import StepLayout

F32 = np.dtype(np.float32)


def tokens(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def rows_of(x, **given):
    """A step whose fetched tokens are all stored."""
    nothing = StepRows(np.zeros((0, *x.shape[1:3])), np.zeros((x.shape[1], 0), np.int32), np.ones(x.shape[1:3], bool))
    return nothing._replace(**given)


def reduced(x, step=None, dtype=F32, **reduction):
    program = jax.jit(lambda x, step: reduce_site(x, step, None, Reduction(**reduction), dtype))
    site = program(x, step or rows_of(x))
    return {name: np.asarray(array) for name, array in site.arrays.items()}, np.asarray(site.peaks), site.losses


@pytest.mark.parametrize(("kind", "largest", "bound"), [("int8", 127, 0.5 / 127), ("fp8", 448, 2**-4)])
@pytest.mark.parametrize("block", [0, 4, 7, 99])
def test_codes_times_scales_are_the_values(kind, largest, bound, block):
    x = tokens(2, 3, 22) * np.array([1e-6, 1, 3e4], np.float32)[:, None]
    codes, scale, restored = map(np.asarray, quantize(jnp.asarray(x), Quantization(kind, block)))
    assert codes.dtype == {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}[kind]
    size = block or 22
    for start in range(0, 22, size):
        part, own = x[..., start : start + size].astype(np.float64), slice(start, start + size)
        np.testing.assert_allclose(scale[..., start // size], np.abs(part).max(-1) / largest, rtol=1e-6)
        error = np.abs(restored[..., own] - part)
        # A code is off by half a step: of the block's scale for integers, of the value itself for floats.
        within = np.abs(part).max(-1, keepdims=True) if kind == "int8" else np.abs(part) + 1e-4 * np.abs(part).max()
        assert (error <= 1.001 * bound * within).all()
        assert np.abs(codes[..., own].astype(np.float64)).max() == largest
    np.testing.assert_array_equal(restored, restore({"activation": codes, "scale": scale}, 22, block))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_codes_are_the_nearest_ones(kind):
    x = tokens(40, 16)
    codes, scale, _ = map(np.asarray, quantize(jnp.asarray(x), Quantization(kind, 0)))
    ratio = x / scale
    if kind == "int8":
        assert (np.abs(codes - ratio) <= 0.5 + 1e-4).all()
    else:
        wanted = ratio.astype(ml_dtypes.float8_e4m3fn)
        # Ties, and what division rounds to the other side of one.
        assert (wanted != codes).mean() < 0.01


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_block_of_zeros_is_restored_as_zeros(kind):
    x = tokens(1, 8)
    x[:, 4:] = 0
    codes, scale, restored = map(np.asarray, quantize(jnp.asarray(x), Quantization(kind, 4)))
    assert scale[0, 1] == 0
    assert (codes[:, 4:] == 0).all()
    assert (restored[:, 4:] == 0).all()


ALL_POOLS = ("mean", "first", "last", "max", "exp:0.07", "exp:2.0")


@pytest.mark.parametrize("selects", [True, False])
@pytest.mark.parametrize("pools", [ALL_POOLS, ("last",), ("exp:0.07", "first")])
def test_pools_of_packed_rows_are_those_of_each_sample_alone(pools, selects):
    rng = np.random.default_rng(len(pools))
    lengths = [rng.integers(1, 9, n).tolist() for n in (3, 1, 3)]
    flat = [n for row in lengths for n in row]
    samples = []
    for index, n in enumerate(flat):
        reasons = (rng.random(n) < 0.6).astype(np.uint8) if selects else None
        samples.append(
            TokenizedSample(index, index, 1, np.zeros(n, np.int32), n, "", reasons=reasons, n_pools=len(pools))
        )
    assert not selects or any(not len(sample.stored_places) for sample in samples)
    numbers = iter(range(len(flat)))
    layout = StepLayout(32, len(lengths) + 1, tuple(tuple(next(numbers) for _ in row) for row in lengths))
    parsed = tuple(map(parse_pool, pools))
    fetch = fetch_rows(layout, samples, flat, parsed)
    x = tokens(2, layout.n_rows, 32, 3)
    taken = x if fetch.gathered is None else np.take_along_axis(x, fetch.gathered[None, :, :, None], axis=2)
    arrays, peaks, _ = reduced(taken, StepRows.of(fetch), pools=parsed)
    starts = {s: sum(flat[o] for o in row[: row.index(s)]) for row in layout.rows for s in row}
    for index, (row, places) in fetch.samples.items():
        found = arrays["activation"][:, row, places]
        assert found.shape[1] == samples[index].n_rows == (len(pools) if len(samples[index].stored_places) else 0)
        stored = x[:, row, starts[index] + samples[index].stored_places].astype(np.float64)
        for number, pool in enumerate(pools[: found.shape[1]]):
            np.testing.assert_allclose(found[:, number], oracle(stored, pool), rtol=0, atol=1e-5)
            assert fetch.sample_at(row, places.start + number) == (index, number)
            np.testing.assert_allclose(peaks[:, row, places.start + number], np.abs(found[:, number]).max(-1))
    assert fetch.is_stored.sum() == sum(sample.n_rows for sample in samples)


def oracle(stored, pool):
    """(L, K, D) to (L, D) in float64, p counted from the last token."""
    if pool in ("first", "last"):
        return stored[:, 0 if pool == "first" else -1]
    if pool in ("max", "mean"):
        return getattr(stored, pool)(axis=1)
    p = np.arange(stored.shape[1])[::-1]
    weights = np.exp(-np.log(2) * p / (float(pool[4:]) * len(p)))
    return np.einsum("k,lkd->ld", weights / weights.sum(), stored)


def test_a_nan_marks_its_own_sample_and_spoils_no_other():
    x = tokens(1, 1, 8, 4)
    wanted = x.copy()
    x[0, 0, 2, 1] = np.nan
    slots = np.array([[0, 0, 0, 1, 1, 1, 2, 2]], np.int32)
    weights = np.where(slots < 2, np.float32(1 / 3), 0)[None]
    for pool in ("mean", "max"):
        step = StepRows(weights, slots, np.array([[True, True]]))
        arrays, peaks, _ = reduced(x, step, pools=(Pool(pool),))
        assert peaks[0, 0, 0] == np.inf
        assert np.isfinite(peaks[0, 0, 1])
        np.testing.assert_allclose(arrays["activation"][0, 0, 1], getattr(wanted[0, 0, 3:6], pool)(axis=0), rtol=1e-5)
    for bad in (np.nan, -np.inf):
        x[0, 0, 2, 1] = bad
        _, peaks, _ = reduced(x, topk=2, quantization=Quantization("int8", 0))
        np.testing.assert_array_equal(np.isinf(peaks[0, 0]), np.arange(8) == 2)


@pytest.mark.parametrize("topk", [None, 5])
@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
def test_the_loss_is_that_of_what_is_restored(topk, kind):
    x = tokens(2, 3, 6, 24, scale=1e18)  # its squares do not fit float32
    x[0, 0, 0] = 0
    is_stored = np.random.default_rng(1).integers(0, 2, (3, 6)).astype(bool)
    quantization = None if kind is None else Quantization(kind, 4)
    arrays, _, losses = reduced(x, rows_of(x, is_stored=is_stored), topk=topk, quantization=quantization)
    exact, found = x.astype(np.float64), restore(arrays, 24, 4).astype(np.float64)
    length = np.linalg.norm(exact, axis=-1)
    with np.errstate(invalid="ignore"):
        relative = np.nan_to_num(np.linalg.norm(found - exact, axis=-1) / length)
        cosine = (found * exact).sum(-1) / (length * np.linalg.norm(found, axis=-1))
    total = LossSum()
    total.add({"residual": np.asarray(losses)})
    figures = total.of_rows(int(is_stored.sum()), {"residual": (3, 7)})["residual"]
    for slot, layer in enumerate(("3", "7")):
        assert figures[layer]["relative_l2"] == pytest.approx(relative[slot][is_stored].mean(), rel=1e-4, abs=1e-7)
        worst = np.nanmin(np.where(is_stored, cosine[slot], np.nan))
        assert figures[layer]["worst_cosine"] == pytest.approx(worst, rel=1e-5)


def test_losses_of_windows_add_up_by_their_rows():
    def one(mean, worst):
        return {"k": {"0": {"relative_l2": mean, "worst_cosine": worst}}}

    assert total_losses([(30, one(0.01, 0.9)), (0, {}), (10, one(0.05, 0.8))]) == one(0.02, 0.8)
    assert total_losses([(5, {})]) == {}


def test_the_order_is_pool_then_topk_then_quantize():
    x = tokens(1, 1, 6, 12)
    step = StepRows(np.full((1, 1, 6), 1 / 6, np.float32), np.zeros((1, 6), np.int32), np.ones((1, 1), bool))
    given = {"pools": (Pool("mean"),), "topk": 3, "quantization": Quantization("int8", 0)}
    arrays, _, _ = reduced(x, step, **given)
    mean = x[0, 0].astype(np.float64).mean(axis=0)
    largest = np.argsort(-np.abs(mean))[:3]
    assert arrays["indices"][0, 0, 0].tolist() == largest.tolist()
    np.testing.assert_allclose(arrays["scale"][0, 0, 0], np.abs(mean).max() / 127, rtol=1e-5)
    np.testing.assert_array_equal(arrays["activation"][0, 0, 0], np.round(mean[largest] / np.abs(mean).max() * 127))
