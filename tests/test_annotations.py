"""Annotations of arrays resolve at run time: where one does not, jaxtyping checks nothing and says nothing."""

import importlib
import inspect
import typing

import pytest

pytest.importorskip("torch")

# They name types of torch_models, which are imported where torch is installed alone.
NEED_TORCH = {
    f"analysis.certificate.certification.{name}" for name in ("_activations", "_require_alike", "_next_tokens")
}
PACKAGES = ("analysis", "arc24", "core", "parquet_cache", "qwen2_jax", "torch_models")


def functions_of(module):
    """Functions and methods that are defined in a module."""
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            yield value
        elif inspect.isclass(value):
            yield from (inspect.unwrap(member) for member in vars(value).values() if inspect.isfunction(member))


def names_arrays(function) -> bool:
    texts = map(str, function.__annotations__.values())
    return any("ndarray" in text or "Array" in text for text in texts)


def test_every_annotation_with_an_array_resolves():
    from test_structure import MODULES

    unresolved, seen = [], 0
    for name in MODULES:
        if name.partition(".")[0] not in PACKAGES:
            continue
        for function in functions_of(importlib.import_module(name.removesuffix(".__init__"))):
            if names_arrays(function) and f"{name}.{function.__qualname__}" not in NEED_TORCH:
                seen += 1
                try:
                    typing.get_type_hints(function, include_extras=True)
                except Exception as error:
                    unresolved.append(f"{name}.{function.__qualname__}: {error}")
    assert seen > 150
    assert unresolved == []
