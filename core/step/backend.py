"""What the engine asks of whatever computes activations. Backends have this shape; they need not derive from it.

Axis letters: L layers stored for the site (`Capture.layers_of`), B rows of the step, T tokens of a row, U what a row
gives: its T tokens, or those that are fetched of them, or what they are reduced to; W values of each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from core.step.layout import BatchShape, StepArrays, default_row_lengths, packed_row_lengths
from core.step.model_shape import ModelShape
from qwen2_jax.taps import Capture

Arrays = Mapping[str, Any]
"""Arrays by name, all of one kind: of JAX, of torch or of numpy."""


@dataclass(frozen=True)
class StepOutput:
    """What one step gives. The arrays lie where they were computed, and may still be computed when it is handed out.

    `gather` (core/step/gathering.py) and `reduce` (core/reduce/reducer.py) make less of it there; `begin_copies` and
    `on_host` (core/step/host_copies.py) bring it to the host. What it gives for padding means nothing.

    Attributes:
      arrays: (L, B, U, W) in the stored dtype, by site; by `core.reduce.reductions.array_name` once they are reduced.
      peaks: (L, B, U) float32 by site, the largest magnitude before the cast to the stored dtype; infinity for a NaN or
        infinity.
      norms: (L, B, T) float32 by site of `StepRequest.norm_sites`, the L2 norm of each token before the cast, summed in
        float32 where the data is. They say which tokens are fetched; then there are none.
      losses: (L, B, 2) float32 by site, once they are reduced: see `core.reduce.arithmetic.ReducedSite`.
    """

    arrays: Arrays
    peaks: Arrays
    norms: Arrays = field(default_factory=dict)
    losses: Arrays = field(default_factory=dict)


class Step(Protocol):
    """A loaded model, ready for one batch after another."""

    def __call__(self, arrays: StepArrays) -> StepOutput:
        """Starts one step. Tokens of different segments do not see each other; segment 0 is padding.

        Returns at once where the device has a queue of its own. Elsewhere the step is done when this returns.
        """
        ...


@dataclass(frozen=True)
class StepRequest:
    """What the engine wants of a step.

    Attributes:
      stored_dtype: a key of `core.base.dtypes.DTYPES`.
      compute_dtype: "float32" or "bfloat16".
      norm_sites: sites of `capture` whose norms will be asked for.
      first_shape: (rows, length) of the step that comes first, to be compiled while the weights are read; a hint.
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
      has_long_rows: whether a row costs what its samples cost, however long it is, and new shapes are compiled quickly.
      reduces_on_device: whether activations are reduced before they are brought to the host, rather than there.
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
        """How many steps are computed at once, each in a thread that calls it.

        With 1 all programs are started by one thread: devices that work together have to see them in one order.
        """
        ...

    def row_multiple(self, model: ModelShape, request: StepRequest) -> int:
        """Every step has a multiple of this many rows."""
        ...

    def model_shape(self, path: str, revision: str | None) -> ModelShape:
        """The sizes of a model, without its weights. Raises ModelError for what is missing or not supported."""
        ...

    def model_digest(self, path: str, revision: str | None) -> str:
        """What tells models apart by their content, wherever their files lie. Reads every local weight once."""
        ...

    def compute_dtype(self, name: str) -> str:
        """A key of `core.jax_utils.COMPUTE_DTYPES`; "auto" is what suits the device."""
        ...

    def load(self, path: str, revision: str | None, request: StepRequest) -> Step:
        """Loads as much of the model as `request` needs. Raises ModelError in one line."""
        ...


def batch_shape(
    backend: Backend, model: ModelShape, request: StepRequest, *, batch_size: int, pack: bool, longest: int
) -> BatchShape:
    """How samples of at most `longest` tokens are laid into steps of `batch_size` rows a device."""
    row_multiple, pack = backend.row_multiple(model, request), pack and backend.can_pack
    lengths = packed_row_lengths(longest, long_rows=backend.has_long_rows) if pack else default_row_lengths(longest)
    return BatchShape(batch_size * row_multiple, row_multiple, lengths, pack)
