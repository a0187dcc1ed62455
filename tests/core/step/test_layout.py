import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.step.layout import (
    BatchShape,
    default_row_lengths,
    lay_out_rows,
    lay_out_steps,
    packed_row_lengths,
    sample_spans,
    step_arrays,
)

lengths_lists = st.lists(st.integers(1, 700), min_size=1, max_size=60)
shapes = st.builds(
    lambda rows, devices, pack, long_rows: BatchShape(
        rows * devices,
        devices,
        packed_row_lengths(700, long_rows=long_rows) if pack else default_row_lengths(700),
        pack,
    ),
    long_rows=st.booleans(),
    rows=st.sampled_from([1, 3, 4]),
    devices=st.sampled_from([1, 8]),
    pack=st.booleans(),
)


@given(lengths_lists, shapes)
def test_every_sample_lies_in_exactly_one_row_and_fits(lengths, shape):
    steps = lay_out_steps(lengths, shape)
    placed = [sample for step in steps for row in step.rows for sample in row]
    assert sorted(placed) == list(range(len(lengths)))
    for step in steps:
        assert step.n_rows % shape.row_multiple == 0
        assert len(step.rows) <= step.n_rows <= shape.rows_per_step
        assert all(sum(lengths[sample] for sample in row) <= step.length for row in step.rows)


@given(lengths_lists, shapes)
def test_rows_are_in_descending_length_and_single_without_packing(lengths, shape):
    rows = lay_out_rows(lengths, shape)
    assert list(rows) == sorted(rows, reverse=True)
    for length, of_length in rows.items():
        for samples in of_length:
            needed = sum(lengths[sample] for sample in samples)
            assert length == min(fitting for fitting in shape.row_lengths if fitting >= needed)
            assert shape.pack or len(samples) == 1


@given(lengths_lists, shapes)
def test_arrays_hold_each_samples_tokens_with_its_own_segment_and_positions(lengths, shape):
    token_ids = [np.arange(1, n + 1, dtype=np.int32) + 1000 * i for i, n in enumerate(lengths)]
    for step in lay_out_steps(lengths, shape):
        arrays = step_arrays(step, token_ids)
        is_token = np.zeros_like(arrays.tokens, bool)
        for row, sample, start, stop in sample_spans(step, lengths):
            np.testing.assert_array_equal(arrays.tokens[row, start:stop], token_ids[sample])
            np.testing.assert_array_equal(arrays.positions[row, start:stop], np.arange(lengths[sample]))
            assert len(set(arrays.segment_ids[row, start:stop])) == 1
            assert start == 0 or arrays.segment_ids[row, start] == arrays.segment_ids[row, start - 1] + 1
            is_token[row, start:stop] = True
        assert (arrays.segment_ids[~is_token] == 0).all()
        assert (arrays.segment_ids[is_token] > 0).all()


@pytest.mark.parametrize(("long_rows", "n_samples", "waste"), [(False, 400, 1.06), (True, 400, 1.01), (True, 16, 1.05)])
def test_packing_long_ragged_samples_wastes_little(long_rows, n_samples, waste):
    rng = np.random.default_rng(0)
    lengths = rng.integers(170, 2000, n_samples).tolist()
    steps = lay_out_steps(lengths, BatchShape(4, 1, packed_row_lengths(2048, long_rows=long_rows), True))
    assert sum(step.n_rows * step.length for step in steps) < waste * sum(lengths)


def test_leftover_rows_use_halved_steps_instead_of_padding():
    steps = lay_out_steps([512] * 7, BatchShape(4, 1, (512,), True))
    assert [step.n_rows for step in steps] == [4, 2, 1]


def test_row_lengths_end_with_the_longest_sample_rounded_up_to_the_tile():
    assert default_row_lengths(2048) == (128, 256, 512, 1024, 2048)
    assert default_row_lengths(1500) == (128, 256, 512, 1024, 1536)
    assert default_row_lengths(10) == (128,)
    assert packed_row_lengths(2048, long_rows=False) == (512, 1024, 2048)
    assert packed_row_lengths(10, long_rows=False) == (128,)


def test_long_rows_hold_the_longest_sample_twice_and_are_trimmed_to_eighths():
    assert packed_row_lengths(2048, long_rows=True) == (512, 1024, 1536, 2048, 2560, 3072, 3584, 4096)
    assert packed_row_lengths(10, long_rows=True) == (256,)
