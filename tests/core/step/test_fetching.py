"""What is fetched of a step holds every stored token once, and little besides."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.samples.windows import TokenizedSample
from core.step.fetching import fetch_of, fetch_size
from core.step.layout import BatchShape, lay_out_steps, step_arrays


def sample(index: int, reasons: list[bool] | None, length: int) -> TokenizedSample:
    """Its token ids number all tokens of all samples."""
    ids = np.arange(1000 * index, 1000 * index + length, dtype=np.int32)
    return TokenizedSample(
        index, index, 1, ids, length, "", reasons=None if reasons is None else np.array(reasons, np.uint8)
    )


dropped = (
    st.lists(st.booleans(), min_size=1, max_size=100)
    | st.integers(1, 100).map(lambda n: [True] * (n - 1) + [False])
    | st.integers(60, 125).map(lambda n: [True] + [False] * n)
)


@given(st.lists(dropped, min_size=1, max_size=12), st.booleans(), st.booleans())
@example([[True] + [False] * 120] * 2, True, True)
def test_every_stored_token_is_found_where_it_is_said_to_be(reasons, is_selected, pack):
    samples = [sample(i, dropped if is_selected else None, len(dropped)) for i, dropped in enumerate(reasons)]
    lengths = [len(s.token_ids) for s in samples]
    seen = {}
    for layout in lay_out_steps(lengths, BatchShape(4, 1, (128, 256), pack)):
        arrays = step_arrays(layout, [s.token_ids for s in samples])
        fetch = fetch_of(layout, samples, lengths)
        fetched = arrays.tokens if fetch.gathered is None else np.take_along_axis(arrays.tokens, fetch.gathered, axis=1)
        for index, (row, places) in fetch.samples.items():
            assert index not in seen
            seen[index] = fetched[row, places].tolist()
        assert sorted(fetched[fetch.is_stored]) == sorted(
            token for index in fetch.samples for token in samples[index].token_ids[samples[index].kept]
        )
        for row, unit in np.argwhere(fetch.is_stored)[:20]:
            index, number = fetch.sample_at(row, unit)
            assert samples[index].token_ids[samples[index].kept[number]] == fetched[row, unit]
        assert is_selected or fetch.gathered is None
    assert seen == {s.sample_idx: s.token_ids[s.kept].tolist() for s in samples}


@given(st.integers(0, 4096), st.integers(1, 32).map(lambda n: 128 * n))
def test_what_is_fetched_is_enough_and_less_than_twice_what_is_needed(most, length):
    size = fetch_size(most, length)
    if size is None:
        assert most > 0.75 * length
    else:
        assert most <= size < length
        assert size < max(2 * most + 2, 16)


@pytest.mark.parametrize("length", [128, 2048, 4096])
def test_few_sizes_are_compiled(length):
    assert len({fetch_size(most, length) for most in range(length + 1)}) <= 12
