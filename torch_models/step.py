"""The step of the torch backend: a batch of rows in, the captured sites in the stored dtype out.

Rows hold one sample each and are padded on the right; if padding would change the result, each row runs alone.

Axis letters: L layers stored for the site, B rows, T tokens of a row, K fetched tokens, D width of the site.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor, nn

from core.step.backend import StepOutput, StepRequest
from core.step.gathering import take_tokens
from core.step.host_copies import begin_copy
from core.step.layout import StepArrays
from core.step.model_shape import ModelShape
from torch_models.hooks import Batch, Reader

_STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class HostCopy:
    """A tensor that is being copied to the host; `numpy.asarray` of it waits.

    done: an event after the copy in the device's queue; None on the CPU, which has no queue.
    """

    tensor: Tensor
    done: Any

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.done is not None:
            self.done.synchronize()
        return np.asarray(_as_numpy(self.tensor), dtype, copy=copy)


@begin_copy.register
def _(tensor: Tensor) -> HostCopy:
    """From CUDA into pinned memory, which the GPU writes directly."""
    if not tensor.is_cuda:
        return HostCopy(tensor, None)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return HostCopy(host, done)


@begin_copy.register
def _(copy: HostCopy) -> HostCopy:
    return copy


@take_tokens.register
def _(tensor: Tensor, places: Int32[np.ndarray, "B K"]) -> Tensor:
    of_rows = torch.from_numpy(places.astype(np.int64)).to(tensor.device)
    return torch.take_along_dim(tensor, of_rows.reshape(1, *places.shape, *[1] * (tensor.ndim - 3)), dim=2)


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """A view; numpy has bfloat16 from ml_dtypes, which torch does not know."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class TorchStep:
    """A model read through hooks; see `core.step.backend.Step`.

    Args:
      reader: of the sites and layers of `request.capture`.
      rows_alone: each row runs by itself, without padding, from the state that the model was loaded in.
    """

    def __init__(
        self,
        reader: Reader,
        request: StepRequest,
        shape: ModelShape,
        *,
        rows_alone: bool,
    ) -> None:
        capture = request.capture
        self._reader = reader
        self._layers = {site: capture.layers_of(site, shape.n_layers) for site in capture.sites}
        self._widths = shape.site_widths
        self._stored = _STORED[request.stored_dtype]
        self._norm_sites = request.norm_sites
        self._rows_alone = rows_alone
        self._device = next(reader.model.parameters()).device
        self._fresh = _length_dependent_state(reader.model) if rows_alone else []

    def __call__(self, arrays: StepArrays) -> StepOutput:
        """Runs the rows that hold a sample; the values of the others are undefined."""
        rows, length = arrays.tokens.shape
        values, peaks = self._zeros(rows, length, self._stored), self._zeros(rows, length, None)
        norms = {site: torch.zeros_like(peaks[site]) for site in self._norm_sites}
        for span, batch in self._batches(arrays):
            tokens = slice(batch.shape[1])

            def on_tap(key: tuple[str, int], seen: Tensor, span: slice = span, tokens: slice = tokens) -> None:
                site, layer = key
                place = (self._layers[site].index(layer), span, tokens)
                # NaN is made infinite first: a maximum may drop it.
                magnitude = torch.where(seen.isfinite(), seen.abs(), torch.inf)
                peaks[site][place] = magnitude.amax(-1).float()
                if site in norms:
                    norms[site][place] = torch.linalg.vector_norm(seen, dim=-1, dtype=torch.float32)
                values[site][place] = seen.to(self._stored)

            self._reader.run(batch, on_tap)
        return StepOutput(values, peaks, norms)

    def _zeros(self, rows: int, length: int, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """(L, B, T, D) in `dtype`, or (L, B, T) in float32, for each site."""
        shapes = {site: (len(layers), rows, length) for site, layers in self._layers.items()}
        if dtype is None:
            return {site: torch.zeros(shape, device=self._device) for site, shape in shapes.items()}
        return {
            site: torch.zeros((*shape, self._widths[site]), dtype=dtype, device=self._device)
            for site, shape in shapes.items()
        }

    def _batches(self, arrays: StepArrays) -> Iterator[tuple[slice, Batch]]:
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

    def _batch(self, arrays: StepArrays, is_token: np.ndarray, rows: slice) -> Batch:
        longest = int(is_token[rows].sum(1).max())
        parts = (array[rows, :longest].astype(np.int64) for array in (arrays.tokens, is_token, arrays.positions))
        return Batch(*(torch.from_numpy(part).to(self._device, non_blocking=True) for part in parts))


def _length_dependent_state(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]:
    """The initial buffers and lengths of rotary embeddings that grow with the longest sample seen."""
    state = []
    for module in model.modules():
        attributes = {name: value for name, value in vars(module).items() if name.endswith("max_seq_len_cached")}
        if attributes:
            state.append((module, dict(module._buffers.items()), attributes))
    return state
