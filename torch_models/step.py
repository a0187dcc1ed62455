"""The step of the torch backend: a batch of rows in, the captured sites in the stored dtype out.

Rows hold one sample each and are padded on the right; where padding would change the result each row runs alone.

Axis letters: L layers stored for the site, B rows, T tokens of a row, K tokens that are fetched, D width of the site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import torch
from jaxtyping import Float32, Int32, Shaped
from torch import Tensor, nn

from qwen2_jax.taps import Capture
from torch_models.hooks import Batch, Reader

_STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class StepRows(Protocol):
    """The rows of a step on the host: `core.step.layout.StepArrays`. Segment 0 is padding."""

    @property
    def tokens(self) -> Int32[np.ndarray, "B T"]: ...

    @property
    def segment_ids(self) -> Int32[np.ndarray, "B T"]: ...

    @property
    def positions(self) -> Int32[np.ndarray, "B T"]: ...


class TorchStepOutput:
    """What one step gave (`core.step.backend.StepOutput`). On CUDA it may still be computed when this is handed out."""

    def __init__(self, values: dict[str, Tensor], peaks: dict[str, Tensor], norms: dict[str, Tensor]) -> None:
        self._values = values
        self._peaks = peaks
        self._norms = norms
        self._copies: dict[str, Tensor] = {}
        self._done = _event(values)

    def wait(self) -> None:
        """Blocks until the device is done with the step."""
        if self._done is not None:
            self._done.synchronize()

    def peaks(self) -> dict[str, Float32[np.ndarray, "L B T"]]:
        """The largest magnitude in each token before the cast; infinity for a NaN or infinity."""
        return {site: array.cpu().numpy() for site, array in self._peaks.items()}

    def norms(self) -> dict[str, Float32[np.ndarray, "L B T"]]:
        """L2 norm of each token before the cast, summed in float32."""
        return {site: array.cpu().numpy() for site, array in self._norms.items()}

    def start_copy(self, kept: Int32[np.ndarray, "B K"] | None) -> None:
        """Begins to bring all tokens, or those that `kept` names in each row, to the host."""
        for site, values in self._values.items():
            chosen = values
            if kept is not None:
                places = torch.from_numpy(kept.astype(np.int64)).to(values.device)[None, :, :, None]
                shape = (values.shape[0], *kept.shape, values.shape[-1])
                chosen = values.gather(2, places.expand(shape))
            if chosen.is_cuda:
                host = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
                host.copy_(chosen, non_blocking=True)
                chosen = host
            self._copies[site] = chosen
        self._done = _event(self._values)
        self._values = {}

    def fetch(self) -> dict[str, Shaped[np.ndarray, "L B K D"]]:
        """What `start_copy` began to bring, in the stored dtype."""
        self.wait()
        return {site: _as_numpy(copy) for site, copy in self._copies.items()}

    @property
    def is_dispatched(self) -> bool:
        """No: what a step gives is brought to the host first."""
        return False

    def on_device(self, kept: Int32[np.ndarray, "B K"] | None) -> dict[str, Shaped[np.ndarray, "L B K D"]]:
        """What `start_copy` and `fetch` give, for whoever goes on with it where it is."""
        self.start_copy(kept)
        return self.fetch()


def _event(values: Mapping[str, Tensor]) -> Any:
    """A mark behind all work that is queued on the device; None on the CPU, which queues none."""
    if not any(tensor.is_cuda for tensor in values.values()):
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """A view; numpy has bfloat16 from ml_dtypes, which torch does not know."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class TorchStep:
    """A model read through hooks; see `core.step.backend.Step`.

    Args:
      reader: of the sites and layers of `capture`.
      norm_sites: whose norms will be asked for.
      rows_alone: each row runs by itself, without padding, from the state that the model was loaded in.
    """

    def __init__(
        self,
        reader: Reader,
        capture: Capture,
        widths: Mapping[str, int],
        n_layers: int,
        *,
        stored_dtype: str,
        norm_sites: tuple[str, ...],
        rows_alone: bool,
    ) -> None:
        self._reader = reader
        self._layers = {site: capture.layers_of(site, n_layers) for site in capture.sites}
        self._widths = widths
        self._stored = _STORED[stored_dtype]
        self._norm_sites = norm_sites
        self._rows_alone = rows_alone
        self._device = next(reader.model.parameters()).device
        self._fresh = _length_dependent_state(reader.model) if rows_alone else []

    def __call__(self, arrays: StepRows) -> TorchStepOutput:
        """Runs the rows that hold a sample; what the others give means nothing."""
        rows, length = arrays.tokens.shape
        values, peaks = self._zeros(rows, length, self._stored), self._zeros(rows, length, None)
        norms = {site: torch.zeros_like(peaks[site]) for site in self._norm_sites}
        for span, batch in self._batches(arrays):
            tokens = slice(batch.shape[1])

            def keep(key: tuple[str, int], seen: Tensor, span: slice = span, tokens: slice = tokens) -> None:
                site, layer = key
                place = (self._layers[site].index(layer), span, tokens)
                # NaN is made infinite first: a maximum may drop it.
                magnitude = torch.where(seen.isfinite(), seen.abs(), torch.inf)
                peaks[site][place] = magnitude.amax(-1).float()
                if site in norms:
                    norms[site][place] = torch.linalg.vector_norm(seen, dim=-1, dtype=torch.float32)
                values[site][place] = seen.to(self._stored)

            self._reader.run(batch, keep)
        return TorchStepOutput(values, peaks, norms)

    def _zeros(self, rows: int, length: int, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """(L, B, T, D) in `dtype`, or (L, B, T) in float32, for each site."""
        shapes = {site: (len(layers), rows, length) for site, layers in self._layers.items()}
        if dtype is None:
            return {site: torch.zeros(shape, device=self._device) for site, shape in shapes.items()}
        return {
            site: torch.zeros((*shape, self._widths[site]), dtype=dtype, device=self._device)
            for site, shape in shapes.items()
        }

    def _batches(self, arrays: StepRows) -> Iterator[tuple[slice, Batch]]:
        """The rows that hold a sample, in one batch as long as the longest or one by one, each with its place."""
        is_token = arrays.segment_ids > 0
        used = int(is_token.any(1).sum())
        if not self._rows_alone:
            yield slice(used), self._batch(arrays, is_token, slice(used))
            return
        for row in range(used):
            for module, buffers, attributes in self._fresh:
                module._buffers.update(buffers)
                module.__dict__.update(attributes)
            span = slice(row, row + 1)
            yield span, self._batch(arrays, is_token, span)

    def _batch(self, arrays: StepRows, is_token: np.ndarray, rows: slice) -> Batch:
        longest = int(is_token[rows].sum(1).max())
        parts = (array[rows, :longest].astype(np.int64) for array in (arrays.tokens, is_token, arrays.positions))
        return Batch(*(torch.from_numpy(part).to(self._device, non_blocking=True) for part in parts))


def _length_dependent_state(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]:
    """What rotary embeddings that grow with the longest sample seen hold at first: their buffers and that length."""
    kept = []
    for module in model.modules():
        attributes = {name: value for name, value in vars(module).items() if name.endswith("max_seq_len_cached")}
        if attributes:
            kept.append((module, dict(module._buffers.items()), attributes))
    return kept
