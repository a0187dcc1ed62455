"""The grammar of `--ds_filter`, with Python as the oracle for what it means."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.base.errors import UsageError
from parquet_cache.dataset.row_filter import FilterError, parse_filter

ROW = {"WhiteElo": 1900, "Site": "a'b", "Result": "1-0", "Bot": None, "white elo": 3, "Rated": True, "x": -1.5}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("WhiteElo > 1800", True),
        ("1800<WhiteElo", True),
        ("WhiteElo >= 1900 and WhiteElo <= 1900", True),
        ("WhiteElo > 1900", False),
        ('WhiteElo > 2000 or Site == "a\'b"', True),
        (r"Site = 'a\'b'", True),
        ("Result in ('1-0', '0-1')", True),
        ("Result not in ['1-0', '0-1']", False),
        ("not Result in ('1/2-1/2')", True),
        ("not (WhiteElo > 1800 and x < 0)", False),
        ("NOT NOT Rated == true", True),
        ("Rated == true or x > 0 and x > 0", True),
        ("(Rated == true or x > 0) and x > 0", False),
        ("`white elo` == 3", True),
        ("x == -1.5 and x > -2e0", True),
        ("Bot == null", True),
        ("Bot != null", False),
        ("Site != null", True),
        ("Bot > 3", False),
        ("Bot != 3", False),
        ("Bot in (3, 4)", False),
        ("not Bot > 3", True),
    ],
)
def test_what_a_filter_means(text, holds):
    assert parse_filter(text).holds(ROW) is holds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the filter ends at character 1, expected a column or a value"),
        ("WhiteElo", "the filter ends at character 9, expected a comparison"),
        ("WhiteElo > ", "the filter ends at character 11, expected a column"),
        ("WhiteElo > 1 WhiteElo", "found 'WhiteElo' at character 14, expected and, or"),
        ("(WhiteElo > 1", r"expected \)"),
        ("a in b", "expected a list in parentheses"),
        ("a in (b)", "b: a list holds numbers and quoted texts"),
        ("a == 'open", "cannot read 'open at character 5"),
        ("a == 12abc", "cannot read 12abc"),
        ("__import__('os').system('true') == 0", r"cannot read \.system"),
        ("f(1) == 0", r"found '\(' at character 2, expected a comparison"),
        ("a.b == 1", r"cannot read \.b"),
        ("[x for x in y]", r"found '\['"),
        ("(" * 100 + "a == 1" + ")" * 100, "nested more than 50 deep"),
        ("not and", "found 'and'"),
    ],
)
def test_what_is_not_of_the_language_is_refused_with_its_place(text, message):
    with pytest.raises(UsageError, match=message):
        parse_filter(text)


def test_a_row_that_cannot_be_compared_is_an_error():
    for text, message in (("Elo > 1", "no column 'Elo'"), ("Site > 1", "they have no order")):
        with pytest.raises(FilterError, match=message):
            parse_filter(text).holds(ROW)


conditions = st.recursive(
    st.builds(
        lambda column, sign, number: f"{column} {sign} {number}",
        st.sampled_from("abc"),
        st.sampled_from(["<", "<=", "==", "!=", ">", ">="]),
        st.integers(-2, 2),
    ),
    lambda inner: st.one_of(
        inner.map(lambda text: f"not ({text})"),
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda parts: "(" + " ".join(parts) + ")"),
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(" ".join),
    ),
    max_leaves=8,
)


@given(conditions, st.fixed_dictionaries({name: st.integers(-2, 2) for name in "abc"}))
def test_it_is_what_python_would_say(text, row):
    assert parse_filter(text).holds(row) is eval(text, {}, row)


@given(st.text(max_size=40))
def test_any_text_is_a_filter_or_one_line(text):
    with contextlib.suppress(UsageError):
        parse_filter(text)
