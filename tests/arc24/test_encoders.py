import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc24.encoders import (
    DEFAULT_GRID_ENCODER,
    GridCodeBlockEncoder,
    GridShapeEncoder,
    GridWithSeparationEncoder,
    MinimalGridEncoder,
    RepeatNumberEncoder,
    ReplaceNumberEncoder,
    RowNumberEncoder,
    create_grid_encoder,
)

GRID = [[0, 1], [2, 3]]

inner_encoders = st.one_of(
    st.just(MinimalGridEncoder()),
    st.sampled_from("| ,;-").map(GridWithSeparationEncoder),
    st.integers(1, 4).map(RepeatNumberEncoder),
)
wrappers = st.lists(
    st.sampled_from([RowNumberEncoder, GridShapeEncoder, GridCodeBlockEncoder, ReplaceNumberEncoder]), max_size=4
)


@st.composite
def encoders(draw):
    encoder = draw(inner_encoders)
    for wrapper in draw(wrappers):
        if wrapper is ReplaceNumberEncoder and "ReplaceNumberEncoder" in repr(encoder):
            continue
        encoder = wrapper(encoder)
    return encoder


@st.composite
def grids(draw):
    rows, columns = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    cells = draw(st.binary(min_size=rows * columns, max_size=rows * columns))
    return [[cell % 10 for cell in cells[row * columns : (row + 1) * columns]] for row in range(rows)]


@given(encoders(), grids())
@settings(max_examples=300, deadline=None)
def test_every_nesting_decodes_back(encoder, grid):
    assert encoder.to_grid(encoder.to_text(grid)) == grid


@given(encoders())
def test_repr_is_the_expression_that_builds_the_encoder(encoder):
    assert create_grid_encoder(repr(encoder)) == encoder


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (9, 9), (10, 10), (30, 30)])
def test_default_encoder_decodes_every_size(size):
    grid = [[(row * 7 + column) % 10 for column in range(size[1])] for row in range(size[0])]
    encoder = create_grid_encoder(DEFAULT_GRID_ENCODER)
    assert encoder.to_grid(encoder.to_text(grid)) == grid


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("MinimalGridEncoder()", "01\n23"),
        ("GridWithSeparationEncoder('|')", "0|1\n2|3"),
        ("RepeatNumberEncoder()", "000111\n222333"),
        ("RepeatNumberEncoder(n=2)", "0011\n2233"),
        ("RowNumberEncoder(MinimalGridEncoder())", "1 01\n2 23"),
        ("GridShapeEncoder(MinimalGridEncoder())", "```grid shape: 2x2\n01\n23\n```"),
        ("GridCodeBlockEncoder(MinimalGridEncoder())", "```grid\n01\n23\n```"),
        ("ReplaceNumberEncoder(MinimalGridEncoder())", "ñò\n÷û"),
        (DEFAULT_GRID_ENCODER, "```grid shape: 2x2\n1 01\n2 23\n```"),
    ],
)
def test_texts_are_those_of_arc24(expression, text):
    assert create_grid_encoder(expression).to_text(GRID) == text


def test_replacement_symbols_stand_for_the_digits_in_order():
    text = create_grid_encoder("ReplaceNumberEncoder(MinimalGridEncoder())").to_text([list(range(10))])
    assert list(text) == ["ñ", "ò", "÷", "û", "ą", "ć", "ď", "ę", "Ě", "Ğ"]


def test_rows_after_the_ninth_have_numbers_of_two_digits():
    assert RowNumberEncoder(MinimalGridEncoder()).to_text([[0]] * 11).split("\n")[8:] == ["9 0", "10 0", "11 0"]


@pytest.mark.parametrize(
    ("expression", "named"),
    [
        ("__import__('os').system('true')", "__import__"),
        ("open('/etc/passwd')", "'open'"),
        ("RowNumberEncoder(OtherEncoder())", "'OtherEncoder'"),
        ("RowNumberEncoder(MinimalGridEncoder)", "parentheses"),
        ("RowNumberEncoder()", "RowNumberEncoder()"),
        ("RowNumberEncoder('x')", "'x'"),
        ("MinimalGridEncoder(1)", "MinimalGridEncoder(1)"),
        ("MinimalGridEncoder(*[1])", "[1]"),
        ("MinimalGridEncoder(**{})", "{}"),
        ("RepeatNumberEncoder(m=3)", "m=3"),
        ("RepeatNumberEncoder(0)", "not 0"),
        ("RepeatNumberEncoder(True)", "True"),
        ("RepeatNumberEncoder(-1)", "-1"),
        ("GridWithSeparationEncoder('1')", "'1'"),
        ("GridWithSeparationEncoder('')", "''"),
        ("GridWithSeparationEncoder('\\n')", "line ends"),
        ("ReplaceNumberEncoder(GridWithSeparationEncoder('ñ'))", "'ñ'"),
        ("GridShapeEncoder(", "GridShapeEncoder("),
        ("", "''"),
        ("(" * 5000, "not an expression"),
        ("MinimalGridEncoder() if 1 else 2", "if"),
        ("MinimalGridEncoder().to_text([[1]])", "to_text"),
    ],
)
def test_an_expression_that_is_no_encoder_is_refused_by_name(expression, named):
    with pytest.raises(ValueError) as refusal:
        create_grid_encoder(expression)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("MinimalGridEncoder()", ""),
        ("MinimalGridEncoder()", "01\n2"),
        ("MinimalGridEncoder()", "01\n2a"),
        ("MinimalGridEncoder()", "01\n23\n"),
        ("MinimalGridEncoder()", "0²"),
        ("GridWithSeparationEncoder('|')", "0|\n1|2"),
        ("RepeatNumberEncoder(3)", "0001"),
        ("RepeatNumberEncoder(3)", "001111"),
        ("RowNumberEncoder(MinimalGridEncoder())", "1 01\n3 23"),
        ("GridShapeEncoder(MinimalGridEncoder())", "```grid shape: 2x3\n01\n23\n```"),
        ("GridShapeEncoder(MinimalGridEncoder())", "```grid shape: 2x2\n01\n23"),
        ("GridCodeBlockEncoder(MinimalGridEncoder())", "01\n23"),
    ],
)
def test_a_text_that_is_no_grid_is_refused(expression, text):
    with pytest.raises(ValueError):
        create_grid_encoder(expression).to_grid(text)
