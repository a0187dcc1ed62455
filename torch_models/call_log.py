"""The inputs and outputs of a model's modules in one forward pass.

Axis letters: B rows, T tokens, W width of a module's values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from torch_models.hooks import tokens_first


@dataclass
class Call:
    """The last call of one module: when it began and ended, input and output (B, T, W), and how often it ran."""

    began: int = -1
    ended: int = -1
    input: Tensor | None = None
    output: Tensor | None = None
    times: int = 0


@dataclass
class CallLog:
    """The calls of one forward pass by module path."""

    shape: tuple[int, int]
    calls: dict[str, Call] = field(default_factory=dict)
    clock: int = 0

    def began(self, name: str) -> Callable[[Any], None]:
        def hook(values: Any) -> None:
            call = self.calls.setdefault(name, Call())
            call.input, call.began = self._copy(values), self._tick()

        return hook

    def ended(self, name: str) -> Callable[[Any], None]:
        def hook(values: Any) -> None:
            call = self.calls.setdefault(name, Call())
            call.output, call.ended = self._copy(values), self._tick()
            call.times += 1

        return hook

    def _copy(self, values: Any) -> Tensor | None:
        # Models add to their tensors in place.
        by_token = tokens_first(values, self.shape)
        return None if by_token is None else by_token.detach().clone()

    def _tick(self) -> int:
        self.clock += 1
        return self.clock

    def once(self, name: str) -> Call | None:
        """The call of a module that ran exactly once."""
        call = self.calls.get(name)
        return call if call is not None and call.times == 1 else None
