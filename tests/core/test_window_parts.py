import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from core.batching import BatchShape, packed_row_lengths, plan_steps, plan_steps_together
from core.window_parts import part_ranges, parts_of_window
from core.windows import TokenizedSample, Window

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
def test_any_number_of_hosts_takes_every_part_once_in_steps_of_equal_shapes(lengths, n_parts, n_hosts):
    window = window_of(lengths)
    turns = [list(parts_of_window(window, SHAPE, n_parts=n_parts, host=h, n_hosts=n_hosts)) for h in range(n_hosts)]
    taken = [part for host in turns for part in host if part.part is not None]
    assert sorted(part.part for part in taken) == list(range(n_parts))
    by_part = sorted(taken, key=lambda part: part.part)
    samples = itertools.chain.from_iterable(part.own.samples for part in by_part)
    assert [sample.sample_idx for sample in samples] == list(range(len(lengths)))
    for at_once in zip(*turns, strict=True):
        shapes = [[(step.length, step.n_rows) for step in part.steps] for part in at_once]
        assert all(own == shapes[0] for own in shapes)
        for part in at_once:
            placed = [sample for step in part.steps for row in step.rows for sample in row.samples]
            assert sorted(placed) == list(range(len(part.own.samples)))
    assert all(part.is_last == (part is host[-1]) for host in turns for part in host)


@given(LENGTHS)
def test_a_part_does_not_depend_on_who_works_beside_its_host(lengths):
    window = window_of(lengths)
    alone = {part.part: part.own.samples for part in parts_of_window(window, SHAPE, n_parts=3)}
    of_three = {h: next(parts_of_window(window, SHAPE, n_parts=3, host=h, n_hosts=3)).own.samples for h in range(3)}
    assert alone.keys() == of_three.keys()
    assert all([s.sample_idx for s in alone[p]] == [s.sample_idx for s in of_three[p]] for p in alone)


@given(LENGTHS)
def test_one_host_plans_the_steps_of_a_run_without_hosts(lengths):
    assert plan_steps_together([lengths], SHAPE) == [plan_steps(lengths, SHAPE)]
    (only,) = parts_of_window(window_of(lengths), SHAPE, n_parts=1)
    assert only.own is only.window
    assert list(only.steps) == plan_steps(lengths, SHAPE)
