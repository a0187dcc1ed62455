"""The reference: transformers itself, with the whole model, eager attention, and one sample at a time.

Axis letters: L layers stored for the site, T tokens, D width of the site, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from qwen2_jax.taps import Capture
from torch_models.backend import missing_reason
from torch_models.hooks import Batch, Reader, hooked, next_tokens
from torch_models.loading import LoadedModel, ModelSource, find_model_taps, load_causal_lm
from torch_models.probing import Taps


@dataclass(frozen=True)
class Reference:
    """A transformers model whose sites are read where the probe found them."""

    loaded: LoadedModel
    taps: Taps

    @classmethod
    def load(cls, source: ModelSource, dtype: str, device: str = "cpu") -> Reference:
        """Loads the whole model in `dtype` ("float32" or "bfloat16"). Raises ModelError."""
        loaded = load_causal_lm(source, dtype, device=device, attention="eager")
        return cls(loaded, find_model_taps(loaded))

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.loaded.n_layers

    def missing(self, capture: Capture) -> dict[str, str]:
        """The sites of `capture` that cannot be read from this model, and why."""
        return {
            site: missing_reason(self.taps, site)
            for site in capture.sites
            if any((site, layer) not in self.taps.found for layer in capture.layers_of(site, self.n_layers))
        }

    @torch.no_grad()
    def activations(
        self, token_ids: Int[np.ndarray, " T"], capture: Capture
    ) -> dict[str, Float32[np.ndarray, "L T _"]]:
        """Every site of `capture` that this model has, for one sample."""
        missing = self.missing(capture)
        wanted = {site: capture.layers_of(site, self.n_layers) for site in capture.sites if site not in missing}
        taps = {(site, layer): self.taps.found[site, layer] for site, layers in wanted.items() for layer in layers}
        seen: dict[tuple[str, int], np.ndarray] = {}

        def on_tap(key: tuple[str, int], values: Tensor) -> None:
            # A batch of one row: (T, D). A copy, because the model may continue in place.
            seen[key] = values[0].to(device="cpu", dtype=torch.float32, copy=True).numpy()

        if taps:
            Reader(self.loaded.model, taps).run(self._batch(token_ids), on_tap)
        return {site: np.stack([seen[site, layer] for layer in layers]) for site, layers in wanted.items()}

    def next_tokens(self, token_ids: Int[np.ndarray, " T"]) -> Int64[np.ndarray, " T"]:
        """The most likely next token after each token."""
        return next_tokens(self.loaded.model, self._batch(token_ids))

    def next_tokens_of(self, final: Float[np.ndarray, "T D"], *, normed: bool) -> Int64[np.ndarray, " T"]:
        """The most likely next tokens by this model's output head, from another implementation's final values.

        final: the residual stream after the last block or, if `normed`, the output of the final norm.
        """
        values = torch.from_numpy(np.ascontiguousarray(final, np.float32))[None]
        layer, site = self.n_layers, "final_norm"
        if not normed:
            layer, site = self.n_layers - 1, "residual"
        tap = self.taps.found[site, layer]

        def replace(given: Tensor) -> Tensor:
            return values.to(given).reshape(given.shape)

        # A forward pass of a sample of the same length, with its final values replaced.
        tokens = np.zeros(len(final), np.int64)
        with hooked(self.loaded.model, on_output={tap.module: replace}):
            return next_tokens(self.loaded.model, self._batch(tokens))

    @cached_property
    def _device(self) -> torch.device:
        return next(self.loaded.model.parameters()).device

    def _batch(self, token_ids: Int[np.ndarray, " T"]) -> Batch:
        return Batch.of_text(token_ids, self._device)
