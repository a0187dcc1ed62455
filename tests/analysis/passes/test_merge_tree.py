"""The tree: one shape whatever the order of arrival, and few values in memory."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.passes.merge_tree import MergeTree


def shape(a: str, b: str) -> str:
    """Merging keeps the brackets, so equal texts are equal trees."""
    return f"({a} {b})"


def merged(order: list[int]) -> str:
    tree = MergeTree[str](len(order), shape)
    for number in order:
        tree.add(number, str(number))
    return tree.root()


@given(st.integers(1, 40).flatmap(lambda n: st.permutations(range(n))))
def test_the_shape_does_not_depend_on_the_order_and_keeps_the_parts_in_order(order):
    text = merged(order)
    assert text == merged(list(range(len(order))))
    assert [int(number) for number in text.replace("(", "").replace(")", "").split()] == list(range(len(order)))


def test_the_tree_is_balanced_and_the_last_one_goes_up_alone():
    assert merged([0, 1, 2, 3, 4]) == "(((0 1) (2 3)) 4)"
    assert merged([0, 1, 2, 3, 4, 5]) == "(((0 1) (2 3)) (4 5))"


@given(st.integers(1, 70), st.sampled_from([1, 2, 4, 8]))
def test_blocks_that_were_merged_elsewhere_make_the_same_tree(count, size):
    blocks = []
    for start in range(0, count, size):
        tree = MergeTree[str](min(size, count - start), shape)
        for number in range(start, min(start + size, count)):
            tree.add(number - start, str(number))
        blocks.append(tree.root())
    whole = MergeTree[str](len(blocks), shape)
    for number, block in enumerate(blocks):
        whole.add(number, block)
    assert whole.root() == merged(list(range(count)))


@pytest.mark.parametrize("workers", [1, 7])
def test_it_holds_a_logarithm_of_values_with_a_few_workers(workers):
    count, most = 1000, 0
    tree = MergeTree[int](count, lambda a, b: a + b)
    late = list(range(0, count, 2 * workers))[:workers]
    for number in [*(n for n in range(count) if n not in late), *late]:
        tree.add(number, 1)
        most = max(most, tree.n_held)
    assert tree.root() == count
    assert most <= (workers + 1) * (math.log2(count) + 1)


def test_a_value_twice_or_missing_is_an_error():
    tree = MergeTree[str](2, shape)
    tree.add(0, "a")
    for wrong in (0, 2, -1):
        with pytest.raises(ValueError, match="twice"):
            tree.add(wrong, "a")
    with pytest.raises(ValueError, match="1 of 2 values are missing"):
        tree.root()
