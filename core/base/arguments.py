"""Arguments of the functions that notebooks call, checked against the fields of the dataclass that they fill."""

import dataclasses
import inspect
import numbers
import operator
import os
import types
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from core.base.errors import UsageError

Function = TypeVar("Function", bound=Callable[..., Any])
_NOUNS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text or a path"}


def checked_arguments(kind: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` as the fields of the dataclass `kind` want them.

    Paths become texts, numpy's numbers Python's, lists tuples, and a single value of a tuple a tuple of one. Raises
    UsageError naming an argument that does not exist or has another type.
    """
    hints = get_type_hints(kind)
    for name in arguments:
        if name not in hints:
            near = [known for known in hints if name in known] or get_close_matches(name, hints)
            more = f": did you mean {' or '.join(near)}?" if near else ""
            raise UsageError(f"{name}: no such argument{more}")
    return {name: _converted(name, value, hints[name]) for name, value in arguments.items()}


def with_fields_of(kind: type, *without: str) -> Callable[[Function], Function]:
    """Shows the fields of the dataclass `kind` as the arguments that a function takes as `**options`.

    Editors, notebooks and `help` then list them with their types and defaults. without: fields that the function
    refuses.
    """

    def show(function: Function) -> Function:
        shown = inspect.signature(function)
        own = [one for one in shown.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        names = {one.name for one in own}.union(without)
        hints = get_type_hints(kind)
        more = [
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=hints[one.name])
            for one in dataclasses.fields(kind)
            if one.name not in names
        ]
        function.__signature__ = shown.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return function

    return show


def path_text(path: Any, name: str) -> str:
    """A path or URL as a text. Raises UsageError naming the argument for anything else."""
    return str(_converted(name, path, str))


def _converted(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        return None if value is None and len(options) < len(get_args(hint)) else _converted(name, value, options[0])
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UsageError(f"{name}={value!r}: must be one of {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        is_single = isinstance(value, str | os.PathLike) or not isinstance(value, Iterable)
        return tuple(_scalar(name, one, get_args(hint)[0]) for one in ([value] if is_single else value))
    return _scalar(name, value, hint)


def _scalar(name: str, value: Any, kind: type) -> Any:
    is_bool = isinstance(value, bool) or type(value).__name__ == "bool"  # numpy's is called so too
    if kind is bool and is_bool:
        return bool(value)
    if kind is str and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if kind is int and not is_bool and hasattr(value, "__index__") and not hasattr(value, "__len__"):
        return operator.index(value)
    if kind is float and not is_bool and isinstance(value, numbers.Real):
        return float(value)
    raise UsageError(f"{name}={value!r}: must be {_NOUNS[kind]}")
