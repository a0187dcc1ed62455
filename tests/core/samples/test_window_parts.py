import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from core.samples.window_parts import part_ranges, parts_of_window
from core.samples.windows import TokenizedSample, Window
from core.step.layout import BatchShape, lay_out_part, lay_out_steps, packed_row_lengths

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=40)
SHAPE = BatchShape(4, 1, packed_row_lengths(512, long_rows=False), pack=True)


def window_of(lengths: list[int]) -> Window:
    samples = [TokenizedSample(i, i, 1, np.zeros(n, np.int32), n, "") for i, n in enumerate(lengths)]
    return Window(1, tuple(samples), (), None)


@given(LENGTHS, st.integers(1, 8))
def test_parts_are_runs_that_hold_each_sample_once_and_tokens_as_even_as_samples_allow(lengths, n_parts):
    ranges = part_ranges(lengths, n_parts)
    assert len(ranges) == n_parts
    assert [sample for samples in ranges for sample in samples] == list(range(len(lengths)))
    share = sum(lengths) / n_parts
    for samples in ranges:
        assert abs(sum(lengths[sample] for sample in samples) - share) <= max(lengths)


@given(LENGTHS, st.integers(1, 6), st.integers(1, 6))
def test_any_number_of_hosts_takes_every_part_with_a_sample_once_and_all_have_as_many_turns(lengths, n_parts, n_hosts):
    window = window_of(lengths)
    turns = [list(parts_of_window(window, n_parts=n_parts, host=h, n_hosts=n_hosts)) for h in range(n_hosts)]
    taken = [part for host in turns for part in host if part.part is not None]
    numbers = [part.part for part in taken]
    assert len(numbers) == len(set(numbers))
    by_part = sorted(taken, key=lambda part: part.part)
    samples = itertools.chain.from_iterable(part.own.samples for part in by_part)
    assert [sample.sample_idx for sample in samples] == list(range(len(lengths)))
    for host in turns:
        assert [(part.turn, part.is_last) for part in host] == [(part.turn, part.is_last) for part in turns[0]]
        assert [part.is_last for part in host] == [False] * (len(host) - 1) + [True]
    for part in itertools.chain.from_iterable(turns):
        steps = lay_out_part(part.own.lengths, SHAPE)
        placed = [sample for step in steps for row in step.rows for sample in row]
        assert sorted(placed) == list(range(len(part.own.samples)))
        assert steps, "a part without steps would get lost on its way"


@given(LENGTHS, st.integers(1, 4))
def test_a_part_does_not_depend_on_who_works_beside_its_host(lengths, n_hosts):
    window = window_of(lengths)

    def parts(host: int, n_hosts: int) -> dict[int, list[int]]:
        taken = parts_of_window(window, n_parts=3, host=host, n_hosts=n_hosts)
        return {part.part: [sample.sample_idx for sample in part.own.samples] for part in taken if part.own.samples}

    together = {part: samples for host in range(n_hosts) for part, samples in parts(host, n_hosts).items()}
    assert together == parts(0, 1)


@given(LENGTHS)
def test_a_window_of_one_part_is_that_part(lengths):
    (only,) = parts_of_window(window_of(lengths), n_parts=1)
    assert only.own is only.window
    assert list(lay_out_part(only.own.lengths, SHAPE)) == lay_out_steps(lengths, SHAPE)
