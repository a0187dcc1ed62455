"""Shapes and dtypes in signatures are checked at run time, in every test."""

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

import jaxtyping
from beartype import beartype

PACKAGES = ("qwen2_jax", "core", "torch_models", "analysis", "arc24", "parquet_cache")
_PLAIN = {"None", "bool", "bytes", "float", "int", "str"}
# Whether a function's signature speaks of arrays, by its code: one that is defined inside another is met many times.
_SPEAKS_OF_ARRAYS: dict[CodeType, bool] = {}


def install() -> None:
    """For modules of ours that are imported from now on.

    jaxtyping's hook wraps every function there is, which costs a fifth of the suite's time; here it wraps those with
    an array in their signature, and the classes.
    """
    wrap = jaxtyping.jaxtyped

    def jaxtyped(**settings: Any) -> Callable[[Any], Any]:
        wrapped = wrap(**settings)
        return lambda decorated: wrapped(decorated) if _is_to_be_checked(decorated) else decorated

    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook(list(PACKAGES), "shape_checks.checked")


def _is_to_be_checked(decorated: Any) -> bool:
    if not inspect.isfunction(decorated):
        return True
    code = decorated.__code__
    if code not in _SPEAKS_OF_ARRAYS:
        _SPEAKS_OF_ARRAYS[code] = any(map(_may_be_of_arrays, decorated.__annotations__.values()))
    return _SPEAKS_OF_ARRAYS[code]


def _may_be_of_arrays(hint: Any) -> bool:
    """A hint that is still a string is resolved by jaxtyping; it may be the name of an array's type."""
    return hint not in _PLAIN if isinstance(hint, str) else "jaxtyping" in repr(hint)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks what a signature says of arrays; what else it says is mypy's business, and tests have doubles for it."""
    said = getattr(function, "__annotations__", {})
    of_arrays = {name: hint for name, hint in said.items() if "jaxtyping" in repr(hint)}
    if not of_arrays:
        return function
    function.__annotations__ = of_arrays
    try:
        return beartype(function)
    finally:
        function.__annotations__ = said
