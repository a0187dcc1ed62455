from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from core.dataset_utils import BadRecord
from core.samples.windows import TOKEN_ID_BYTES, StreamPlace, TokenizedSample, cut_windows


def sample(index: int, n_tokens: int) -> TokenizedSample:
    return TokenizedSample(index, index, 1, np.zeros(n_tokens, np.int32), n_tokens, "")


def item(index: int, n_tokens: int):
    return sample(index, n_tokens) if n_tokens else BadRecord(index, index + 1, "bad")


streams = st.lists(st.integers(0, 30), max_size=60).map(lambda sizes: [item(i, n) for i, n in enumerate(sizes)])


@given(streams, st.integers(1, 200))
def test_windows_hold_every_sample_once_in_order(items, shard_bytes):
    windows = list(cut_windows(items, bytes_per_row=2, shard_bytes=shard_bytes))
    samples = [s for window in windows for s in window.samples]
    assert samples == [i for i in items if isinstance(i, TokenizedSample)]
    assert [window.index for window in windows] == list(range(1, len(windows) + 1))
    if samples:
        assert [bad for window in windows for bad in window.bad_records] == [
            i for i in items if isinstance(i, BadRecord)
        ]
        assert [window.next_place is None for window in windows] == [False] * (len(windows) - 1) + [True]


@given(streams, st.integers(1, 200))
def test_a_window_closes_at_the_first_sample_that_reaches_the_shard_size(items, shard_bytes):
    windows = list(cut_windows(items, bytes_per_row=6, shard_bytes=shard_bytes))
    for window in windows:
        assert 6 * sum(window.lengths[:-1]) < shard_bytes
        assert window.next_place is None or 6 * window.n_tokens >= shard_bytes


@given(streams, st.integers(1, 200), st.randoms())
def test_a_window_counts_what_is_stored_of_a_sample_and_the_token_ids_of_all(items, shard_bytes, random):
    def selected(item):
        if not isinstance(item, TokenizedSample):
            return item
        reasons = np.array([random.randint(0, 1) for _ in item.token_ids], np.uint8)
        return replace(item, reasons=reasons, most_stored=random.choice([None, int((reasons == 0).sum()) // 2]))

    def size(samples):
        most = [int((s.reasons == 0).sum()) if s.most_stored is None else s.most_stored for s in samples]
        return max(20 * sum(most), TOKEN_ID_BYTES * sum(len(s.token_ids) for s in samples))

    for window in cut_windows(map(selected, items), bytes_per_row=20, shard_bytes=shard_bytes):
        assert size(window.samples[:-1]) < shard_bytes
        assert window.next_place is None or size(window.samples) >= shard_bytes
        assert window.n_stored == sum(s.n_stored for s in window.samples) == window.offsets[-1]
        for s in window.samples:
            assert s.n_stored <= len(s.stored_places) == int((s.reasons == 0).sum())


@given(streams, st.integers(1, 200), st.data())
def test_windows_behind_any_place_are_those_of_the_uninterrupted_stream(items, shard_bytes, data):
    windows = list(cut_windows(items, bytes_per_row=2, shard_bytes=shard_bytes))
    resumable = [window for window in windows if window.next_place is not None]
    if not resumable:
        return
    last_done = data.draw(st.sampled_from(resumable))
    place: StreamPlace = last_done.next_place
    rest = [i for i in items if i.position >= place.position]
    again = list(cut_windows(rest, bytes_per_row=2, shard_bytes=shard_bytes, first_index=last_done.index + 1))
    assert again == windows[last_done.index :]
