"""Forward hooks: where the values of each site are read, and a forward pass that stops once all have been read.

Axis letters: L layers, B rows, T tokens, D width of the site.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor, nn


@dataclass(frozen=True)
class Columns:
    """Some columns of each token's vector: columns start..stop-1 of each of `groups` equal groups."""

    groups: int
    start: int
    stop: int

    def of(self, values: Tensor) -> Tensor:
        """A view (…, groups, stop - start) of (…, W)."""
        return values.unflatten(-1, (self.groups, -1))[..., self.start : self.stop]


@dataclass(frozen=True)
class Tap:
    """Where a site is read: the output of a module, or its input (the first tensor), or some columns of that.

    module: its path below the model.
    """

    module: str
    of_input: bool = False
    columns: Columns | None = None

    def read(self, values: Tensor) -> Tensor:
        """(B, T, D) of the module's tensor."""
        return values if self.columns is None else self.columns.of(values).flatten(-2)


class StopForward(Exception):
    """Stops a forward pass after the last value that is needed; not an error."""


@dataclass(frozen=True)
class Batch:
    """Rows of one sample each, padded on the right.

    Attributes:
      token_ids, attention_mask: (B, T); the mask is 1 on tokens and 0 on padding.
      position_ids: (B, T), from 0 in each row; those of padding do not matter.
    """

    token_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]

    @classmethod
    def of_text(cls, token_ids: Int[np.ndarray, " T"], device: torch.device) -> Batch:
        """One row without padding."""
        ids = torch.from_numpy(np.asarray(token_ids, np.int64))[None].to(device)
        return cls(ids, torch.ones_like(ids), torch.arange(len(token_ids), device=device)[None])

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.token_ids.shape[0], self.token_ids.shape[1]


def run_model(model: nn.Module, batch: Batch) -> Any:
    """A forward pass without cache; None when a hook stopped it early."""
    inputs: dict[str, Any] = {"input_ids": batch.token_ids, "attention_mask": batch.attention_mask}
    accepted = inspect.signature(model.forward).parameters
    optional: dict[str, Any] = {"position_ids": batch.position_ids, "use_cache": False, "return_dict": True}
    # Models without rotary or learned positions take no position_ids: they derive positions from the mask or the index.
    inputs |= {name: value for name, value in optional.items() if name in accepted}
    try:
        return model(**inputs)
    except StopForward:
        return None


@torch.no_grad()
def next_tokens(model: nn.Module, batch: Batch) -> Int64[np.ndarray, " T"]:
    """The most likely next token after each token of the one row of `batch`."""
    tokens: Int64[np.ndarray, " T"] = run_model(model, batch).logits[0].argmax(-1).cpu().numpy()
    return tokens


def tokens_first(values: Any, shape: tuple[int, int]) -> Tensor | None:
    """A module's input or output as (B, T, W); None when it is not a tensor with the batch's rows and tokens."""
    if not isinstance(values, Tensor):
        return None
    rows, tokens = shape
    if values.ndim >= 3 and tuple(values.shape[:2]) == shape:
        return values.flatten(2)
    if values.ndim == 2 and values.shape[0] == rows * tokens:
        return values.unflatten(0, shape)
    return None


def first_tensor(values: Any) -> Any:
    """The first of several values: a module's main output."""
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
    """Within the block, calls each function with the first tensor of the input, or output, of the module of that path.

    A tensor that a function of `on_output` returns replaces the module's output.
    """
    handles = []
    for name, function in (on_input or {}).items():
        handles.append(model.get_submodule(name).register_forward_pre_hook(_input_hook(function), with_kwargs=True))
    for name, function in (on_output or {}).items():
        handles.append(model.get_submodule(name).register_forward_hook(_output_hook(function)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return function(first_argument(args, kwargs))

    return hook


def _output_hook(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = function(first_tensor(output))
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


@dataclass(frozen=True)
class Reader:
    """Reads sites of a model, and stops each forward pass after the last of them.

    taps: (site, layer) → where it is read.
    """

    model: nn.Module
    taps: Mapping[tuple[str, int], Tap]

    @torch.no_grad()
    def run(self, batch: Batch, on_values: Callable[[tuple[str, int], Tensor], None]) -> None:
        """One forward pass: calls `on_values` with each (site, layer) and its (B, T, D), as they are computed.

        The tensor belongs to the model, which may change it as soon as `on_values` returns.
        """
        left = set(self.taps)
        by_module: dict[tuple[str, bool], list[tuple[str, int]]] = {}
        for key, tap in self.taps.items():
            by_module.setdefault((tap.module, tap.of_input), []).append(key)

        def reading(keys: list[tuple[str, int]]) -> Callable[[Any], None]:
            def read(values: Any) -> None:
                by_token = tokens_first(values, batch.shape)
                assert by_token is not None
                for key in keys:
                    on_values(key, self.taps[key].read(by_token))
                    left.discard(key)
                if not left:
                    raise StopForward

            return read

        on_input = {name: reading(keys) for (name, of_input), keys in by_module.items() if of_input}
        on_output = {name: reading(keys) for (name, of_input), keys in by_module.items() if not of_input}
        with hooked(self.model, on_input=on_input, on_output=on_output):
            run_model(self.model, batch)
