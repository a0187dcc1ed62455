"""Checks that untrusted JSON has the expected fields and types."""

from collections.abc import Mapping
from typing import Any

Kinds = Mapping[str, tuple[type, ...]]

NONE = type(None)
_MISSING = object()


def mistyped(value: Any, kinds: Kinds) -> str | None:
    """The first field of `value` that is missing or of the wrong type; None when all are right."""
    if not isinstance(value, dict):
        return next(iter(kinds))
    # type(), for isinstance takes True for a number.
    return next((name for name, allowed in kinds.items() if type(value.get(name, _MISSING)) not in allowed), None)


def require_types(value: Any, kinds: Kinds, where: str = "") -> None:
    """Raises ValueError naming the first field that is missing or of the wrong type; `where` prefixes its name."""
    wrong = mistyped(value, kinds)
    if wrong is not None:
        raise ValueError(f"{where + wrong!r} is missing or of the wrong type")


def require_all(values: Any, kind: type, where: str) -> None:
    """Raises ValueError naming `where` unless `values` is a list of `kind`."""
    if type(values) is not list or any(type(value) is not kind for value in values):
        raise ValueError(f"{where!r} is not a list of {kind.__name__}")
