"""Shapes and dtypes in signatures are checked at run time, in every test."""

from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook

PACKAGES = ("qwen2_jax", "core", "torch_models", "analysis", "arc24")


def install() -> None:
    """For modules of ours that are imported from now on."""
    install_import_hook(list(PACKAGES), "shape_checks.checked")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks a function whose signature names the shape of an array; what else it says is mypy's business."""
    hints = getattr(function, "__annotations__", {}).values()
    return beartype(function) if any("jaxtyping" in repr(hint) for hint in hints) else function
