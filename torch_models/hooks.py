"""Forward hooks: where a site's values are read off, and a forward pass that ends once all of them are there.

Axis letters: L layers, B rows, T tokens, D width of the site.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Columns:
    """A part of each token's vector: cut into `groups` equal groups, places start..stop of each group."""

    groups: int
    start: int
    stop: int

    def of(self, values: Tensor) -> Tensor:
        """A view (…, groups, stop - start) of (…, W)."""
        return values.unflatten(-1, (self.groups, -1))[..., self.start : self.stop]


@dataclass(frozen=True)
class Tap:
    """Where a site is read: what a module gives, or what it is given (its first tensor), or some columns of that.

    module: its path below the model.
    """

    module: str
    of_input: bool = False
    columns: Columns | None = None

    def read(self, values: Tensor) -> Tensor:
        """(B, T, D) of the module's tensor."""
        return values if self.columns is None else self.columns.of(values).flatten(-2)


class StopForward(Exception):
    """Ends a forward pass whose last wanted value has been seen; no error."""


@dataclass(frozen=True)
class Batch:
    """Rows of one sample each, padded on the right.

    Attributes:
      token_ids, attention_mask: (B, T); the mask is 1 on tokens and 0 on padding.
      position_ids: (B, T), from 0 in each row; what padding has is never seen.
    """

    token_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.token_ids.shape[0], self.token_ids.shape[1]


def run_model(model: nn.Module, batch: Batch) -> Any:
    """A forward pass without cache; None when a hook ended it early."""
    inputs: dict[str, Any] = {"input_ids": batch.token_ids, "attention_mask": batch.attention_mask}
    accepted = inspect.signature(model.forward).parameters
    optional: dict[str, Any] = {"position_ids": batch.position_ids, "use_cache": False, "return_dict": True}
    # Models without rotary or learned positions take no position_ids; theirs follow from the mask or the place.
    inputs |= {name: value for name, value in optional.items() if name in accepted}
    try:
        return model(**inputs)
    except StopForward:
        return None


def tokens_first(values: Any, shape: tuple[int, int]) -> Tensor | None:
    """(B, T, W) of what a module took or gave, or None when it is no tensor with the batch's rows and tokens."""
    if not isinstance(values, Tensor):
        return None
    rows, tokens = shape
    if values.ndim >= 3 and tuple(values.shape[:2]) == shape:
        return values.flatten(2)
    if values.ndim == 2 and values.shape[0] == rows * tokens:
        return values.unflatten(0, shape)
    return None


def first_tensor(values: Any) -> Any:
    """The first of several values; a module's main result comes first."""
    if isinstance(values, Mapping):
        values = tuple(values.values())
    return values[0] if isinstance(values, tuple | list) and values else values


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first tensor among the arguments."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


@contextmanager
def hooked(
    model: nn.Module,
    *,
    on_input: Mapping[str, Callable[[Any], Any]] | None = None,
    on_output: Mapping[str, Callable[[Any], Any]] | None = None,
) -> Iterator[None]:
    """Calls each function with the first tensor that the module of that path takes, or gives, while the block lasts.

    A function of `on_output` that returns a tensor replaces what the module gives.
    """
    handles = []
    for name, see in (on_input or {}).items():
        handles.append(model.get_submodule(name).register_forward_pre_hook(_input_hook(see), with_kwargs=True))
    for name, see in (on_output or {}).items():
        handles.append(model.get_submodule(name).register_forward_hook(_output_hook(see)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(see: Callable[[Any], Any]) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return see(first_argument(args, kwargs))

    return hook


def _output_hook(see: Callable[[Any], Any]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = see(first_tensor(output))
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


@dataclass(frozen=True)
class Reader:
    """Reads the wanted sites off a model, and stops each forward pass behind the last of them.

    taps: (site, layer) → where it is read.
    """

    model: nn.Module
    taps: Mapping[tuple[str, int], Tap]

    @torch.no_grad()
    def run(self, batch: Batch, keep: Callable[[tuple[str, int], Tensor], None]) -> None:
        """One forward pass: calls `keep` with each site, layer and its (B, T, D) as they are computed.

        A tensor is the model's own and may be changed by it as soon as `keep` returns.
        """
        left = set(self.taps)
        at: dict[tuple[str, bool], list[tuple[str, int]]] = {}
        for key, tap in self.taps.items():
            at.setdefault((tap.module, tap.of_input), []).append(key)

        def seeing(keys: list[tuple[str, int]]) -> Callable[[Any], None]:
            def see(values: Any) -> None:
                given = tokens_first(values, batch.shape)
                assert given is not None
                for key in keys:
                    keep(key, self.taps[key].read(given))
                    left.discard(key)
                if not left:
                    raise StopForward

            return see

        on_input = {name: seeing(keys) for (name, of_input), keys in at.items() if of_input}
        on_output = {name: seeing(keys) for (name, of_input), keys in at.items() if not of_input}
        with hooked(self.model, on_input=on_input, on_output=on_output):
            run_model(self.model, batch)
