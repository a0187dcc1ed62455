"""Grid encoders: an ARC grid as text, and back.

Encoders nest, are given on the command line as the expression that builds them, and decode exactly what they encode:
`encoder.to_grid(encoder.to_text(grid)) == grid`. Names and texts are those of the public arc24 modules.
"""

import ast
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from arc24.tasks import Grid

DEFAULT_GRID_ENCODER = "GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))"
REPLACEMENT_SYMBOLS = "ñò÷ûąćďęĚĞ"

_DIGITS = {str(digit): digit for digit in range(10)}
_TO_SYMBOLS = str.maketrans("0123456789", REPLACEMENT_SYMBOLS)
_FROM_SYMBOLS = str.maketrans(REPLACEMENT_SYMBOLS, "0123456789")
_SHAPE_BLOCK = re.compile(r"```grid shape: ([0-9]+)x([0-9]+)\n(.*)\n```", re.DOTALL)
_CODE_BLOCK = re.compile(r"```grid\n(.*)\n```", re.DOTALL)


class GridEncoder(ABC):
    """A reversible text form of a grid."""

    @abstractmethod
    def to_text(self, grid: Grid) -> str:
        """The grid as text, rows separated by line feeds, without a line feed at the end."""

    @abstractmethod
    def to_grid(self, text: str) -> Grid:
        """The grid with this text. Raises ValueError if there is none."""


@dataclass(frozen=True)
class MinimalGridEncoder(GridEncoder):
    """One character a cell: `01\\n23`."""

    def to_text(self, grid: Grid) -> str:
        """See GridEncoder."""
        return "\n".join("".join(map(str, row)) for row in grid)

    def to_grid(self, text: str) -> Grid:
        """See GridEncoder."""
        return _grid_from_cells(text.split("\n"))


@dataclass(frozen=True)
class GridWithSeparationEncoder(GridEncoder):
    """Cells joined by a symbol: `0|1\\n2|3`."""

    split_symbol: str

    def __post_init__(self) -> None:
        symbol = self.split_symbol
        if not isinstance(symbol, str) or not symbol or re.search(r"[0-9\r\n]", symbol):
            raise ValueError(f"GridWithSeparationEncoder needs a symbol without digits or line ends, not {symbol!r}")

    def to_text(self, grid: Grid) -> str:
        """See GridEncoder."""
        return "\n".join(self.split_symbol.join(map(str, row)) for row in grid)

    def to_grid(self, text: str) -> Grid:
        """See GridEncoder."""
        return _grid_from_cells(line.split(self.split_symbol) for line in text.split("\n"))


@dataclass(frozen=True)
class RepeatNumberEncoder(GridEncoder):
    """Each digit n times: `000111\\n222333`."""

    n: int = 3

    def __post_init__(self) -> None:
        if type(self.n) is not int or self.n < 1:
            raise ValueError(f"RepeatNumberEncoder needs a whole number of repeats from 1, not {self.n!r}")

    def to_text(self, grid: Grid) -> str:
        """See GridEncoder."""
        return "\n".join("".join(str(cell) * self.n for cell in row) for row in grid)

    def to_grid(self, text: str) -> Grid:
        """See GridEncoder."""
        return _grid_from_cells(self._cells(line) for line in text.split("\n"))

    def _cells(self, line: str) -> list[str]:
        runs = [line[start : start + self.n] for start in range(0, len(line), self.n)]
        for run in runs:
            if run != run[0] * self.n:
                raise ValueError(f"{run!r} is not one digit {self.n} times")
        return [run[0] for run in runs]


@dataclass(frozen=True)
class _Wrapper(GridEncoder):
    base_encoder: GridEncoder

    def __post_init__(self) -> None:
        if not isinstance(self.base_encoder, GridEncoder):
            raise ValueError(f"{type(self).__name__} wraps another grid encoder, not {self.base_encoder!r}")


@dataclass(frozen=True)
class RowNumberEncoder(_Wrapper):
    """Each line of the base encoder after its number, counted from 1: `1 01\\n2 23`."""

    def to_text(self, grid: Grid) -> str:
        """See GridEncoder."""
        lines = self.base_encoder.to_text(grid).split("\n")
        return "\n".join(f"{number} {line}" for number, line in enumerate(lines, 1))

    def to_grid(self, text: str) -> Grid:
        """See GridEncoder."""
        lines = text.split("\n")
        for number, line in enumerate(lines, 1):
            if not line.startswith(f"{number} "):
                raise ValueError(f"line {number} does not start with its number: {line[:20]!r}")
        return self.base_encoder.to_grid("\n".join(line.split(" ", 1)[1] for line in lines))


@dataclass(frozen=True)
class GridShapeEncoder(_Wrapper):
    """The base encoder's text in a block that names the shape."""

    def to_text(self, grid: Grid) -> str:
        """See GridEncoder."""
        return f"```grid shape: {len(grid)}x{len(grid[0])}\n{self.base_encoder.to_text(grid)}\n```"

    def to_grid(self, text: str) -> Grid:
        """See GridEncoder."""
        block = _SHAPE_BLOCK.fullmatch(text)
        if block is None:
            raise ValueError("the text is not one '```grid shape: RxC' block")
        grid = self.base_encoder.to_grid(block[3])
        if (len(grid), len(grid[0])) != (int(block[1]), int(block[2])):
            raise ValueError(f"the block says {block[1]}x{block[2]} and holds {len(grid)}x{len(grid[0])}")
        return grid


@dataclass(frozen=True)
class GridCodeBlockEncoder(_Wrapper):
    """The base encoder's text in a `grid` code block."""

    def to_text(self, grid: Grid) -> str:
        """See GridEncoder."""
        return f"```grid\n{self.base_encoder.to_text(grid)}\n```"

    def to_grid(self, text: str) -> Grid:
        """See GridEncoder."""
        block = _CODE_BLOCK.fullmatch(text)
        if block is None:
            raise ValueError("the text is not one '```grid' block")
        return self.base_encoder.to_grid(block[1])


@dataclass(frozen=True)
class ReplaceNumberEncoder(_Wrapper):
    """The base encoder's text with the digits 0-9 as ñ ò ÷ û ą ć ď ę Ě Ğ."""

    def __post_init__(self) -> None:
        super().__post_init__()
        clash = set(self.base_encoder.to_text([[0, 1]])) & set(REPLACEMENT_SYMBOLS)
        if clash:
            raise ValueError(
                f"ReplaceNumberEncoder cannot tell its symbols from the {min(clash)!r} of its base encoder"
            )

    def to_text(self, grid: Grid) -> str:
        """See GridEncoder."""
        return self.base_encoder.to_text(grid).translate(_TO_SYMBOLS)

    def to_grid(self, text: str) -> Grid:
        """See GridEncoder."""
        return self.base_encoder.to_grid(text.translate(_FROM_SYMBOLS))


_ENCODERS: dict[str, type[GridEncoder]] = {
    encoder.__name__: encoder
    for encoder in (
        MinimalGridEncoder,
        GridWithSeparationEncoder,
        RepeatNumberEncoder,
        RowNumberEncoder,
        GridShapeEncoder,
        GridCodeBlockEncoder,
        ReplaceNumberEncoder,
    )
}


def create_grid_encoder(expression: str) -> GridEncoder:
    """The encoder that `expression` builds, e.g. `GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))`.

    The expression is parsed, never evaluated: it may contain only encoder names, texts and whole numbers.
    Raises ValueError naming the part that is not allowed.
    """
    try:
        return _build(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(
            f"grid encoder {expression[:100]!r} is not an expression such as {DEFAULT_GRID_ENCODER}"
        ) from None


def _build(node: ast.expr) -> GridEncoder:
    if isinstance(node, ast.Name) and node.id in _ENCODERS:
        raise ValueError(f"grid encoder {node.id} needs parentheses: {node.id}(...)")
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f"grid encoder: {ast.unparse(node)[:100]!r} is not one of {', '.join(_ENCODERS)}")
    if node.func.id not in _ENCODERS:
        raise ValueError(f"unknown grid encoder {node.func.id!r}: known are {', '.join(_ENCODERS)}")
    positional = [_argument(argument) for argument in node.args]
    named = {keyword.arg or "**": _argument(keyword.value) for keyword in node.keywords}
    try:
        return _ENCODERS[node.func.id](*positional, **named)
    except TypeError:
        raise ValueError(f"wrong arguments in grid encoder {ast.unparse(node)[:100]!r}") from None


def _argument(node: ast.expr) -> GridEncoder | str | int:
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int):
        return node.value
    return _build(node)


def _grid_from_cells(rows: Iterable[Iterable[str]]) -> Grid:
    grid: Grid = []
    for row in rows:
        cells = [_DIGITS.get(cell, -1) for cell in row]
        if not cells or -1 in cells:
            raise ValueError(f"row {len(grid)} is not a row of digits")
        if grid and len(cells) != len(grid[0]):
            raise ValueError(f"row {len(grid)} has {len(cells)} cells, row 0 has {len(grid[0])}")
        grid.append(cells)
    return grid
