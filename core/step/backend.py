"""What the engine asks of whatever computes activations. Backends have this shape; they need not import it.

Axis letters: L layers stored for the site (`Capture.layers_of`), B rows, T tokens of a row, K tokens of a row that are
fetched, D width of the site.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Int32, Shaped

from core.step.layout import StepArrays
from core.step.model_shape import ModelShape
from qwen2_jax.taps import Capture


class StepOutput(Protocol):
    """What one step gives, possibly still being computed when it is handed out.

    Every dict has the captured sites as keys, `norms` only those it was asked for. Padding means nothing in any of the
    arrays. Calls come in this order: `start_copy` once, before or after the others, and `fetch` at the end.
    """

    def wait(self) -> None:
        """Blocks until the device is done with the step."""
        ...

    def peaks(self) -> dict[str, Float32[np.ndarray, "L B T"]]:
        """The largest magnitude in each token before the cast to the stored dtype; infinity for a NaN or infinity."""
        ...

    def norms(self) -> dict[str, Float32[np.ndarray, "L B T"]]:
        """L2 norm of each token before the cast, summed in float32 where the data is; for `StepRequest.norm_sites`."""
        ...

    def start_copy(self, kept: Int32[np.ndarray, "B K"] | None) -> None:
        """Begins to bring tokens to the host: all T of a row, or the K whose places in their row `kept` names.

        Only those K are to cross to the host. Rows with fewer than K tokens repeat any place. Returns at once.
        """
        ...

    def fetch(self) -> dict[str, Shaped[np.ndarray, "L B K D"]]:
        """What `start_copy` began to bring, in the stored dtype; waits for it."""
        ...


class DeviceOutput(StepOutput, Protocol):
    """What a backend's step gives: it may also be worked on where it is."""

    @property
    def is_dispatched(self) -> bool:
        """Whether `on_device` returns at once."""
        ...

    def on_device(self, kept: Int32[np.ndarray, "B K"] | None) -> dict[str, Any]:
        """In the place of `start_copy` and `fetch`: the same tokens in the stored dtype, where they were computed.

        (L, B, K, D) arrays of JAX, or of numpy on the host. What was not asked for is let go.
        """
        ...


class Step(Protocol):
    """A loaded model, ready for one batch after another."""

    def __call__(self, arrays: StepArrays) -> StepOutput:
        """Starts one step. Tokens of different segments do not see each other; segment 0 is padding."""
        ...


class DeviceStep(Protocol):
    """A step of a backend."""

    def __call__(self, arrays: StepArrays) -> DeviceOutput:
        """As of `Step`."""
        ...


@dataclass(frozen=True)
class StepRequest:
    """What the engine wants of a step.

    Attributes:
      stored_dtype: a key of `core.shards.formats.DTYPES`.
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
    """

    @property
    def name(self) -> str: ...

    @property
    def can_pack(self) -> bool: ...

    @property
    def has_long_rows(self) -> bool: ...

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

    def load(self, path: str, revision: str | None, request: StepRequest) -> DeviceStep:
        """Loads as much of the model as `request` needs. Raises ModelError in one line."""
        ...
