"""The incremental whitener: which tokens count, batches in any form, and saving it at every batch."""

import ml_dtypes
import numpy as np
import pytest

from analysis.moments import Moments
from analysis.whitening import IncrementalWhitener, Whitening, WhiteningSettings, load_whitening
from core.base.errors import RunError, UsageError

BOS, PAD, WIDTH, LENGTH = 1, 0, 6, 10
N_BATCHES = 5


def batches(*, left: bool = False) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Activations, masks and ids; the padding holds NaN, the BOS 1,000."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(N_BATCHES):
        lengths = rng.integers(2, LENGTH + 1, 4)[:, None]
        places = np.arange(LENGTH)
        mask = (places >= LENGTH - lengths) if left else (places < lengths)
        first = np.cumsum(mask, axis=1) * mask == 1
        ids = np.where(first, BOS, np.where(mask, rng.integers(5, 50, mask.shape), PAD))
        x = (rng.normal(size=(4, LENGTH, WIDTH)) + 3).astype(np.float32)
        x[first] = 1000
        x[~mask] = np.nan
        found.append((x, mask, ids))
    return found


def whitener(**options) -> IncrementalWhitener:
    return IncrementalWhitener(WhiteningSettings("zca"), bos_token_id=BOS, pad_token_id=PAD, **options)


@pytest.mark.parametrize("left", [False, True])
def test_bos_and_padding_do_not_count(left):
    data = batches(left=left)
    counted = [x[mask & (ids != BOS)] for x, mask, ids in data]
    one, by_ids, first = whitener(), whitener(), whitener(exclude=("pad", "first"))
    for x, mask, ids in data:
        one.update(x, attention_mask=mask.astype(np.int64), token_ids=ids)
        by_ids.partial_fit(x, token_ids=ids)
        first.update(x, mask)
    expected = Moments.of(np.concatenate(counted))
    for found in (one, by_ids, first):
        assert found.moments.count == expected.count
        np.testing.assert_allclose(found.moments.scatter, expected.scatter, rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(one.finalize().transform, Whitening.fit(expected, one.settings).transform, rtol=1e-9)
    assert one.n_seen == 4 * N_BATCHES


def test_what_is_not_excluded_counts_and_the_mask_outranks_the_pad_id():
    x, mask, ids = batches()[0]
    everything = whitener(exclude=("pad",)).update(x, mask, ids)
    assert everything.moments.count == mask.sum()
    assert everything.moments.extremes.high.max() == 1000
    text_with_pads = np.where(mask & (ids != BOS), PAD, ids)
    assert whitener().update(x, mask, text_with_pads).moments.count == mask.sum() - 4
    none = IncrementalWhitener(bos_token_id=None).update(x, mask)
    assert none.moments.count == mask.sum(), "a tokenizer without a BOS leaves none out"
    assert none.update(x, np.zeros_like(mask)).moments.count == mask.sum()


@pytest.mark.parametrize("left", [False, True])
def test_the_first_token_is_the_first_that_is_no_padding_also_of_a_sample_of_one(left):
    mask = np.array([[0, 0, 1, 1], [0, 0, 0, 1]]) if left else np.array([[1, 1, 0, 0], [1, 0, 0, 0]])
    found = IncrementalWhitener(exclude=("first",)).counted(np.ones((2, 4, 3)), mask)
    expected = [[1, 1, 0, 1], [1, 1, 1, 0]] if left else [[0, 1, 1, 1], [0, 1, 1, 1]]
    np.testing.assert_array_equal(found, np.array(expected, bool))


def test_rows_that_were_selected_before_are_taken_as_they_are():
    x, mask, ids = batches()[0]
    counts = mask & (ids != BOS)
    rows = whitener().update(x[counts])
    assert rows.moments.to_arrays()["scatter"].tobytes() == whitener().update(x, mask, ids).moments.scatter.tobytes()
    assert whitener().update(x[mask], token_ids=ids[mask]).moments.count == counts.sum()


def test_the_largest_tokens_are_known_by_sample_position_and_id():
    data = batches()
    x, mask, ids = data[2]
    x[3, 1] = 77
    mask[3, 1], ids[3, 1] = True, 33
    found = whitener()
    for batch in data:
        found.update(*batch)
    largest = found.moments.largest.to_json()[0]
    assert (largest["sample_idx"], largest["position"], largest["token_id"]) == (2 * 4 + 3, 1, 33)


def test_saved_and_loaded_after_every_batch_it_goes_on_with_the_same_bits(tmp_path):
    plain, resumed = whitener(), whitener()
    for number, batch in enumerate(batches()):
        plain.update(*batch)
        resumed.save(f"{tmp_path}/{number}.safetensors")
        resumed = IncrementalWhitener.load(f"{tmp_path}/{number}.safetensors").update(*batch)
        assert (resumed.settings, resumed.filter, resumed.n_seen) == (plain.settings, plain.filter, plain.n_seen)
        expected = {name: array.tobytes() for name, array in plain.moments.to_arrays().items()}
        assert {name: array.tobytes() for name, array in resumed.moments.to_arrays().items()} == expected
    for one, name in ((plain, "plain"), (resumed, "resumed")):
        one.finalize()
        one.save(f"{tmp_path}/{name}.safetensors")
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "resumed.safetensors").read_bytes()
    x, mask, ids = batches()[1]
    loaded = IncrementalWhitener.load(f"{tmp_path}/plain.safetensors")
    np.testing.assert_array_equal(loaded.transform(x, mask, ids), plain.transform(x, mask, ids))
    # A finalized one is a whitening too, for whoever only applies it.
    np.testing.assert_array_equal(load_whitening(f"{tmp_path}/plain.safetensors").mean, plain.whitening.mean)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_transform_keeps_places_and_leaves_zeros_where_tokens_do_not_count(dtype):
    found = whitener()
    data = [(x.astype(dtype), mask, ids) for x, mask, ids in batches()]
    for batch in data:
        found.update(*batch)
    found.finalize()
    z = np.concatenate([found.transform(*batch) for batch in data])
    counts = np.concatenate([found.counted(*batch) for batch in data])
    assert (z.shape, z.dtype) == ((4 * N_BATCHES, LENGTH, WIDTH), np.float32)
    assert not z[~counts].any()
    assert np.abs(np.cov(z[counts].T.astype(np.float64)) - np.eye(WIDTH)).max() < 1e-5
    x = np.concatenate([batch[0] for batch in data])
    np.testing.assert_allclose(found.inverse_transform(z)[counts], x[counts].astype(np.float32), rtol=1e-3, atol=1e-3)


def test_what_cannot_be_is_refused_in_one_line(tmp_path):
    x, mask, ids = batches()[0]
    refusals = [
        (lambda: whitener(exclude=("eos",)), "exclude eos: expected some of bos, pad, first"),
        (lambda: whitener().update(x, mask), "exclude bos: needs token_ids"),
        (lambda: IncrementalWhitener().update(x, token_ids=ids), "exclude pad: needs attention_mask"),
        (lambda: whitener(exclude=("first",)).update(x[mask]), "exclude first: rows"),
        (lambda: whitener().update(x, mask[:, 1:], ids), r"attention_mask has shape \(4, 9\)"),
        (lambda: whitener().update(x[0, 0]), r"a batch of shape \(6,\)"),
        (lambda: whitener().update(x, mask, ids).update(x[..., 1:], mask, ids), "5 wide: those before were 6 wide"),
        (lambda: whitener().finalize(), "no batches: call update first"),
        (lambda: whitener().transform(x, mask, ids), "call finalize first"),
        (lambda: IncrementalWhitener.load(str(tmp_path / "none")), "there is no such file"),
    ]
    for act, message in refusals:
        with pytest.raises(UsageError, match=message):
            act()
    with pytest.raises(RunError, match="sample 0, position 0, dimension 0: nan"):
        whitener(exclude=()).update(np.full((1, 2, 3), np.nan))


def test_an_update_after_finalize_needs_another_finalize():
    found = whitener()
    for batch in batches():
        found.update(*batch)
    first = found.finalize()
    assert found.finalize() is first
    found.update(*batches()[0])
    assert found.whitening is None
    assert found.finalize().n_samples > first.n_samples
