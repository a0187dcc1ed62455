"""`--ds_filter`: a small language of comparisons, parsed by hand and never evaluated as code.

    expression  = conjunction { "or" conjunction }
    conjunction = negation { "and" negation }
    negation    = "not" negation | "(" expression ")" | comparison
    comparison  = operand ( "==" | "=" | "!=" | "<" | "<=" | ">" | ">=" ) operand
                | operand [ "not" ] "in" "(" literal { "," literal } ")"
    operand     = column | literal
    literal     = number | 'text' | "text" | true | false | null

A column is a name, or any text between backticks. A comparison with a null is false, but for `== null`, `!= null`.
"""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from core.base.errors import UsageError

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))
    |(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    |`(?P<quoted>[^`]+)`
    |(?P<word>[^\W\d]\w*)
    |(?P<symbol>==|!=|<=|>=|[=<>(),\[\]]))""",
    re.VERBOSE | re.DOTALL,
)
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}
_KEYWORDS = ("and", "or", "not", "in")
_DEEPEST = 50


class FilterError(ValueError):
    """A row whose values the filter cannot compare."""


class Condition(Protocol):
    """A parsed filter."""

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether the row is kept. Raises FilterError for a column it lacks, or values without an order."""
        ...


@dataclass(frozen=True)
class Column:
    """The value of a row's column."""

    name: str

    def value(self, row: Mapping[str, Any]) -> Any:
        """Raises FilterError where the row has no such column."""
        if self.name not in row:
            raise FilterError(f"--ds_filter: no column {self.name!r}: the columns are {', '.join(row)}")
        return row[self.name]


@dataclass(frozen=True)
class Literal:
    """A value that the filter states."""

    constant: Any

    def value(self, row: Mapping[str, Any]) -> Any:
        """The same for every row."""
        return self.constant


@dataclass(frozen=True)
class RowComparison:
    """Two operands and what is asked of them."""

    left: Column | Literal
    sign: str
    right: Column | Literal

    def holds(self, row: Mapping[str, Any]) -> bool:
        """See `Condition`."""
        left, right = self.left.value(row), self.right.value(row)
        if self.sign in ("==", "="):
            return bool(left == right)
        if Literal(None) in (self.left, self.right):
            return bool(left is not right)
        if left is None or right is None:
            return False
        if self.sign == "!=":
            return bool(left != right)
        try:
            return bool(_COMPARISONS[self.sign](left, right))
        except TypeError:
            raise FilterError(f"--ds_filter: {left!r:.40} {self.sign} {right!r:.40}: they have no order") from None


@dataclass(frozen=True)
class Membership:
    """Whether an operand is among literals."""

    operand: Column | Literal
    members: tuple[Any, ...]

    def holds(self, row: Mapping[str, Any]) -> bool:
        """See `Condition`."""
        value = self.operand.value(row)
        return value is not None and value in self.members


@dataclass(frozen=True)
class Negation:
    """The opposite."""

    condition: Condition

    def holds(self, row: Mapping[str, Any]) -> bool:
        """See `Condition`."""
        return not self.condition.holds(row)


@dataclass(frozen=True)
class Junction:
    """All of some conditions, or any of them."""

    conditions: tuple[Condition, ...]
    needs_all: bool

    def holds(self, row: Mapping[str, Any]) -> bool:
        """See `Condition`."""
        held = (condition.holds(row) for condition in self.conditions)
        return all(held) if self.needs_all else any(held)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    place: int


def parse_filter(text: str) -> Condition:
    """The filter as a value. Raises UsageError with the place of what is not of the language."""
    return _Parser(text).whole()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._split()
        self._next = 0
        self._depth = 0

    def whole(self) -> Condition:
        found = self._expression()
        if self._peek().kind != "end":
            self._refuse("and, or, or the end of the filter")
        return found

    def _split(self) -> list[_Token]:
        tokens, place = [], 0
        end = len(self._text.rstrip())
        while place < end:
            match = _TOKEN.match(self._text, place)
            if match is None:
                raise UsageError(f"--ds_filter: cannot read {self._text[place:].strip():.20} at character {place + 1}")
            kind = str(match.lastgroup)
            tokens.append(_Token(kind, match[kind], match.start(kind) + 1))
            place = match.end()
        return [*tokens, _Token("end", "", end + 1)]

    def _expression(self) -> Condition:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise UsageError(f"--ds_filter: nested more than {_DEEPEST} deep")
        alternatives = [self._conjunction()]
        while self._take_word("or"):
            alternatives.append(self._conjunction())
        self._depth -= 1
        return alternatives[0] if len(alternatives) == 1 else Junction(tuple(alternatives), needs_all=False)

    def _conjunction(self) -> Condition:
        demands = [self._negation()]
        while self._take_word("and"):
            demands.append(self._negation())
        return demands[0] if len(demands) == 1 else Junction(tuple(demands), needs_all=True)

    def _negation(self) -> Condition:
        n_negations = 0
        while self._take_word("not"):
            n_negations += 1
        condition: Condition
        if self._take_symbol("("):
            condition = self._expression()
            self._expect(")")
        else:
            condition = self._comparison()
        return Negation(condition) if n_negations % 2 else condition

    def _comparison(self) -> Condition:
        left = self._operand()
        is_negated = self._take_word("not")
        if self._take_word("in"):
            members = Membership(left, self._members())
            return Negation(members) if is_negated else members
        sign = self._peek()
        if is_negated or sign.kind != "symbol" or sign.text not in ("==", "=", "!=", *_COMPARISONS):
            self._refuse("a comparison such as > or in")
        self._next += 1
        return RowComparison(left, sign.text, self._operand())

    def _members(self) -> tuple[Any, ...]:
        closing = {"(": ")", "[": "]"}.get(self._peek().text)
        if closing is None:
            self._refuse("a list in parentheses")
        self._next += 1
        members = [self._literal()]
        while self._take_symbol(","):
            members.append(self._literal())
        self._expect(closing)
        return tuple(members)

    def _literal(self) -> Any:
        operand = self._operand()
        if isinstance(operand, Column):
            raise UsageError(f"--ds_filter: {operand.name}: a list holds numbers and quoted texts")
        return operand.constant

    def _operand(self) -> Column | Literal:
        token = self._peek()
        if token.kind in ("end", "symbol") or (token.kind == "word" and token.text.lower() in _KEYWORDS):
            self._refuse("a column or a value")
        self._next += 1
        if token.kind == "number":
            is_whole = re.fullmatch(r"[-+]?\d+", token.text)
            return Literal(int(token.text) if is_whole else float(token.text))
        if token.kind == "text":
            return Literal(re.sub(r"\\(.)", r"\1", token.text[1:-1], flags=re.DOTALL))
        if token.kind == "word" and token.text.lower() in _CONSTANTS:
            return Literal(_CONSTANTS[token.text.lower()])
        return Column(token.text)

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take_word(self, word: str) -> bool:
        token = self._peek()
        is_there = token.kind == "word" and token.text.lower() == word
        self._next += is_there
        return is_there

    def _take_symbol(self, symbol: str) -> bool:
        token = self._peek()
        is_there = token.kind == "symbol" and token.text == symbol
        self._next += is_there
        return is_there

    def _expect(self, symbol: str) -> None:
        if not self._take_symbol(symbol):
            self._refuse(symbol)

    def _refuse(self, expected: str) -> NoReturn:
        token = self._peek()
        found = f"found {token.text!r}" if token.kind != "end" else "the filter ends"
        raise UsageError(f"--ds_filter: {found} at character {token.place}, expected {expected}")
