"""Shapes and dtypes in signatures are checked at run time, in every test."""

from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import install_import_hook

PACKAGES = ("qwen2_jax", "core", "torch_models", "analysis", "arc24")


def install() -> None:
    """For modules of ours that are imported from now on."""
    install_import_hook(list(PACKAGES), "shape_checks.checked")


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
