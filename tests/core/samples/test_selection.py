"""Which tokens are stored, against a slow oracle that asks token by token."""

import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.base.errors import UsageError
from core.samples.selection import (
    REASONS,
    TOKEN_KINDS,
    Selection,
    TokenFacts,
    count_reasons,
    dropped_ranges,
    parse_positions,
    reasons_from_ranges,
    token_facts,
)

FACTS = TokenFacts(
    {"bos": frozenset({1}), "pad": frozenset({0}), "eos": frozenset({2}), "special": frozenset({0, 1, 2, 3})},
    ends_line=lambda token: token in (4, 5),
)
ends = st.none() | st.integers(-12, 12)
selections = st.builds(
    Selection,
    exclude=st.sets(st.sampled_from(TOKEN_KINDS)).map(lambda kinds: tuple(k for k in TOKEN_KINDS if k in kinds)),
    positions=st.lists(st.tuples(ends, ends), max_size=3).map(tuple),
    max_tokens=st.none() | st.integers(1, 9),
    choice=st.sampled_from(["first", "last"]),
)
tokens = st.lists(st.integers(0, 9), min_size=1, max_size=20)


def expected_reasons(ids: list[int], rules: Selection, outliers: set[int] = frozenset()) -> list[str | None]:
    """None for a token that is stored, else why it is not."""

    def reason(place: int) -> str | None:
        for kind in rules.exclude:
            if kind == "newline_first" and place and FACTS.ends_line(ids[place - 1]):
                return kind
            if kind != "newline_first" and ids[place] in FACTS.ids[kind]:
                return kind
        places = list(range(len(ids)))
        if rules.positions and not any(place in places[start:stop] for start, stop in rules.positions):
            return "position"
        return "norm_outlier" if place in outliers else None

    reasons = [reason(place) for place in range(len(ids))]
    left = [place for place, why in enumerate(reasons) if why is None]
    if rules.max_tokens is not None:
        stays = left[: rules.max_tokens] if rules.choice == "first" else left[-rules.max_tokens :]
        reasons = ["limit" if place in left and place not in stays else why for place, why in enumerate(reasons)]
    return reasons


def named(reasons: np.ndarray) -> list[str | None]:
    return [REASONS[code - 1] if code else None for code in reasons]


@given(tokens, selections)
def test_each_token_has_the_first_reason_that_applies(ids, rules):
    found = rules.before(np.array(ids, np.int32), 7, FACTS)
    assert named(found) == expected_reasons(ids, rules)
    assert rules.most_kept(found) == named(found).count(None)


@given(tokens, selections, st.floats(1.01, 5), st.data())
def test_outliers_are_those_above_k_times_the_median_of_what_the_rules_before_left(ids, rules, factor, data):
    rules = replace(rules, outlier_factor=factor)
    row = st.lists(st.floats(0, 100, width=32), min_size=len(ids), max_size=len(ids))
    norms = data.draw(st.lists(row, min_size=1, max_size=3))
    first = rules.before(np.array(ids, np.int32), 7, FACTS)
    left = [p for p, why in enumerate(expected_reasons(ids, replace(rules, max_tokens=None))) if why is None]
    outliers = {
        place
        for layer in norms
        for place in range(len(ids))
        if left and layer[place] > factor * statistics.median(layer[p] for p in left)
    }
    found = rules.after(first, np.array(norms, np.float32), 7)
    assert named(found) == expected_reasons(ids, rules, outliers)
    assert named(found).count(None) <= rules.most_kept(first)
    assert rules.most_kept(first) == len(left if rules.max_tokens is None else left[: rules.max_tokens])


def test_a_norm_that_is_not_finite_is_no_outlier_for_it_must_be_reported():
    rules = Selection(outlier_factor=2.0)
    norms = np.array([[1, 1, np.inf, np.nan, 9]], np.float32)
    kept = named(rules.after(np.zeros(5, np.uint8), norms[:, [0, 1, 2, 4, 0]], 0))
    assert kept == [None, None, None, "norm_outlier", None]
    assert named(rules.after(np.zeros(5, np.uint8), norms, 0)) == [None] * 5


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 5), st.integers(0, 30))
def test_a_random_choice_is_a_matter_of_each_token_alone(length, limit, sample, start):
    def kept(most, start=0):
        rules = Selection(positions=((start, None),), max_tokens=most, choice="random", seed=3)
        return set(np.flatnonzero(rules.before(np.zeros(length, np.int32), sample, None) == 0))

    assert kept(limit) == kept(limit)
    assert len(kept(limit)) == min(limit, length)
    assert kept(limit) <= kept(limit + 1)
    assert {place for place in kept(limit) if place >= start} <= kept(limit, start)


def test_random_choices_differ_between_samples_and_seeds_and_are_even():
    ids = np.zeros(40, np.int32)
    counts = np.zeros(40)
    for sample in range(600):
        counts += Selection(max_tokens=10, choice="random").before(ids, sample, None) == 0
    # 600 draws of a quarter: mean 150, standard deviation 10.6.
    assert 100 < counts.min() < 140
    assert 160 < counts.max() < 200
    one, other = (Selection(max_tokens=10, choice="random", seed=s).before(ids, 0, None) for s in (0, 1))
    assert (one != other).any()


@given(st.lists(st.integers(0, len(REASONS)), min_size=0, max_size=40))
def test_ranges_keep_every_reason_and_plain_json(codes):
    reasons = np.array(codes, np.uint8)
    ranges = dropped_ranges(reasons)
    np.testing.assert_array_equal(reasons_from_ranges(ranges, len(codes)), reasons)
    assert all(type(end) is int for runs in ranges.values() for run in runs for end in run)
    assert count_reasons([reasons, reasons]) == {
        reason: 2 * codes.count(code) for code, reason in enumerate(REASONS, 1) if code in codes
    }


@pytest.mark.parametrize(
    "ranges",
    [
        [],
        {"made_up": [[0, 1]]},
        {"bos": [[0, 1], [0, 1]]},
        {"bos": [[0, 1]], "eos": [[0, 2]]},
        {"bos": [[3, 5]]},
        {"bos": [[-1, 1]]},
        {"bos": [[1, 1]]},
        {"bos": [[True, 2]]},
        {"bos": [0, 1]},
        {"bos": 1},
    ],
)
def test_ranges_that_cannot_be_are_refused(ranges):
    with pytest.raises(ValueError):
        reasons_from_ranges(ranges, 4)


@pytest.mark.parametrize(("text", "start", "stop"), [("0:4", 0, 4), (":4", 0, 4), ("-8:", -8, None), (":", 0, None)])
def test_positions_are_python_slices(text, start, stop):
    assert parse_positions(text) == (start, stop)


@pytest.mark.parametrize("text", ["", "5", "1:2:3", "a:b", "1-4", "1:4 ", "--1:2"])
def test_what_is_no_slice_is_refused_by_name(text):
    with pytest.raises(UsageError, match=r"--positions .*START:STOP"):
        parse_positions(text)


def test_the_facts_are_those_of_the_tokenizer(smollm2):
    from qwen2_jax import load_tokenizer

    tokenizer = load_tokenizer(str(smollm2))
    facts = token_facts(tokenizer)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>", "<repo_name>")}
    assert facts.ids["bos"] == {ids["<|im_start|>"]}
    assert facts.ids["eos"] == {ids["<|im_end|>"]}
    assert set(ids.values()) <= facts.ids["special"]
    encoded = tokenizer("a\nb\n\nc d", add_special_tokens=False)["input_ids"]
    text = [tokenizer.decode([token]) for token in encoded]
    assert [facts.ends_line(token) for token in encoded] == [piece[-1] == "\n" for piece in text]
    first = Selection(exclude=("newline_first",)).before(np.array(encoded, np.int32), 0, facts)
    assert [text[i] for i in np.flatnonzero(first)] == [
        text[i + 1] for i in range(len(text) - 1) if text[i][-1] == "\n"
    ]
    assert first.any()
