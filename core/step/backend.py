"""The protocols of a backend and of its step. A backend implements them; it need not derive from them.

Axis letters: L layers stored for the site (`Capture.layers_of`), B rows of the step, T tokens of a row, U output rows
per row of the step (tokens, gathered tokens or pools), W values of an output row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int, Int32

from core.step.layout import BatchShape, StepArrays, default_row_lengths, packed_row_lengths
from core.step.model_shape import ModelShape
from qwen2_jax.taps import Capture

Arrays = Mapping[str, Any]
"""Arrays by name, all of one library: JAX, torch or numpy."""


@dataclass(frozen=True)
class StepOutput:
    """The output of one step, on the device that computes it; the arrays may still be computing.

    `gather` (core/step/gathering.py) and `Reducer` (core/reduce/reducer.py) make it smaller on the device;
    `begin_copies` and `on_host` (core/step/host_copies.py) copy it to the host. Values at padding are undefined.

    Attributes:
      arrays: (L, B, U, W) in the stored dtype, by site; after a reduction by `core.reduce.reductions.array_name`.
      peaks: (L, B, U) float32 by site, the largest magnitude before the cast to the stored dtype; infinity for a NaN or
        infinity.
      norms: (L, B, T) float32 by site of `StepRequest.norm_sites`, the L2 norm of each token before the cast, summed in
        float32 on the device. Empty once the tokens are gathered.
      losses: (L, B, 2) float32 by site, after a reduction: see `core.reduce.arithmetic.ReducedSite`.
    """

    arrays: Arrays
    peaks: Arrays
    norms: Arrays = field(default_factory=dict)
    losses: Arrays = field(default_factory=dict)


class Step(Protocol):
    """A loaded model that computes one batch at a time."""

    def __call__(self, arrays: StepArrays) -> StepOutput:
        """Starts one step. Tokens of different segments do not see each other; segment 0 is padding.

        Returns at once if the device has a queue of its own; otherwise the step is done when this returns.
        """
        ...


@dataclass(frozen=True)
class StepRequest:
    """The capture, dtypes and norms that the engine asks of a step.

    Attributes:
      stored_dtype: a key of `core.base.dtypes.DTYPES`.
      compute_dtype: "float32" or "bfloat16".
      norm_sites: sites of `capture` whose norms are computed too.
      first_shape: a hint, the (rows, length) of the first step: it is compiled while the weights are read.
    """

    capture: Capture
    stored_dtype: str
    compute_dtype: str
    norm_sites: tuple[str, ...] = ()
    first_shape: tuple[int, int] | None = None


class Backend(Protocol):
    """One way to run a model.

    Attributes:
      name: "jax" or "torch".
      can_pack: whether a row may hold several samples; otherwise each row is one sample, padded on the right.
      has_long_rows: whether the cost of a row is that of its samples, not of its length, and shapes compile quickly.
      reduces_on_device: whether activations are reduced on the device before they are copied, rather than on the host.
    """

    @property
    def name(self) -> str: ...

    @property
    def can_pack(self) -> bool: ...

    @property
    def has_long_rows(self) -> bool: ...

    @property
    def reduces_on_device(self) -> bool: ...

    def lanes(self, model: ModelShape, request: StepRequest) -> int:
        """How many steps are computed at once, each in a thread of its own.

        With 1, one thread starts all programs: devices that communicate must run them in the same order.
        """
        ...

    def row_multiple(self, model: ModelShape, request: StepRequest) -> int:
        """The number that divides the number of rows of every step."""
        ...

    def model_shape(self, path: str, revision: str | None) -> ModelShape:
        """The sizes of a model, without its weights. Raises ModelError for a missing or unsupported model."""
        ...

    def model_digest(self, path: str, revision: str | None) -> str:
        """A digest of the model's content, independent of its path. Reads every local weight once."""
        ...

    def compute_dtype(self, name: str) -> str:
        """A key of `core.jax_utils.COMPUTE_DTYPES`; "auto" is the backend's choice for the device."""
        ...

    def load(self, path: str, revision: str | None, request: StepRequest) -> Step:
        """Loads the layers that `request` needs. Raises a one-line ModelError."""
        ...

    def next_tokens(
        self, path: str, revision: str | None, compute_dtype: str, texts: Sequence[Int32[np.ndarray, " _"]]
    ) -> list[Int[np.ndarray, " _"]]:
        """The most likely next token after each token of each text, by the model's own output head.

        Loads the whole model for it, in `compute_dtype`. Raises ModelError for a model without a head.
        """
        ...


def batch_shape(
    backend: Backend, model: ModelShape, request: StepRequest, *, batch_size: int, pack: bool, longest: int
) -> BatchShape:
    """The shapes of steps of `batch_size` rows a device, for samples of at most `longest` tokens."""
    row_multiple, pack = backend.row_multiple(model, request), pack and backend.can_pack
    lengths = packed_row_lengths(longest, long_rows=backend.has_long_rows) if pack else default_row_lengths(longest)
    return BatchShape(batch_size * row_multiple, row_multiple, lengths, pack)
