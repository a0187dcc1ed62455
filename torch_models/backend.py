"""The torch backend (`core.step.backend.Backend`): any causal language model that transformers supports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from absl import logging
from jaxtyping import Int32, Int64

from core.base.errors import ModelError
from core.step.backend import StepRequest
from qwen2_jax.taps import SITES, Capture
from torch_models.hooks import Batch, Reader, Tap, next_tokens
from torch_models.loading import (
    LoadedModel,
    ModelSource,
    TorchModelShape,
    best_device,
    find_model_taps,
    load_causal_lm,
    model_digest,
)
from torch_models.loading import model_shape as shape_without_weights
from torch_models.probing import Taps
from torch_models.step import TorchStep

# Rotary scalings whose angles depend on the longest row of a batch.
_LENGTH_SCALINGS = {"dynamic", "longrope", "su"}


@dataclass(frozen=True)
class TorchBackend:
    """transformers on one device: CUDA where there is one, else the CPU.

    trust_remote_code: run code that comes with a model.
    """

    trust_remote_code: bool = False

    name = "torch"
    can_pack = False
    has_long_rows = False
    reduces_on_device = False

    def lanes(self, model: object, request: StepRequest) -> int:
        """One: hooks are set on the one model there is."""
        return 1

    def row_multiple(self, model: object, request: StepRequest) -> int:
        """One device: any number of rows will do."""
        return 1

    def compute_dtype(self, name: str) -> str:
        """`auto` is bfloat16 on CUDA, float32 on the CPU."""
        if name != "auto":
            return name
        return "bfloat16" if best_device() == "cuda" else "float32"

    def model_digest(self, path: str, revision: str | None) -> str:
        """A digest of the model's content."""
        return model_digest(ModelSource(path, revision, self.trust_remote_code))

    def model_shape(self, path: str, revision: str | None) -> TorchModelShape:
        """The sizes of a model, without its weights. Raises ModelError."""
        return shape_without_weights(ModelSource(path, revision, self.trust_remote_code))

    def load(self, path: str, revision: str | None, request: StepRequest) -> TorchStep:
        """Loads the blocks up to the last captured one, and checks numerically where each site is.

        Raises ModelError for a site that cannot be found, or whose values contradict its definition.
        """
        source, capture = ModelSource(path, revision, self.trust_remote_code), request.capture
        shape = self.model_shape(path, revision)
        # At least one block, because the embedding is checked against its input.
        n_loaded = max(1, capture.layers_run(shape.n_layers))
        loaded = load_causal_lm(source, request.compute_dtype, n_layers=n_loaded, device=best_device())
        taps = find_model_taps(loaded)
        rows_alone = taps.rows_alone or depends_on_length(loaded)
        if rows_alone:
            logging.info("%s: a row's values depend on the lengths of other rows, so rows run one at a time", path)
        return TorchStep(
            Reader(loaded.model, wanted_taps(taps, capture, shape, path)), request, shape, rows_alone=rows_alone
        )

    def next_tokens(
        self, path: str, revision: str | None, compute_dtype: str, texts: Sequence[Int32[np.ndarray, " _"]]
    ) -> list[Int64[np.ndarray, " _"]]:
        """See the protocol."""
        source, device = ModelSource(path, revision, self.trust_remote_code), best_device()
        loaded = load_causal_lm(source, compute_dtype, device=device)
        if not loaded.has_head:
            raise ModelError(f"{path}: the model has no output head")
        return [next_tokens(loaded.model, Batch.of_text(text, torch.device(device))) for text in texts]


def wanted_taps(taps: Taps, capture: Capture, shape: TorchModelShape, path: str) -> dict[tuple[str, int], Tap]:
    """The taps of all captured sites. Raises ModelError naming the first site that the model lacks."""
    wanted = {}
    for site in capture.sites:
        for layer in capture.layers_of(site, shape.n_layers):
            tap = taps.found.get((site, layer))
            if tap is None:
                raise ModelError(f"{path}: {site} cannot be captured: {missing_reason(taps, site)}")
            if taps.widths[site] != shape.site_widths[site]:
                raise ModelError(
                    f"{path}: {site} cannot be captured: width {taps.widths[site]} is not {shape.site_widths[site]}"
                )
            wanted[site, layer] = tap
    return wanted


def missing_reason(taps: Taps, site: str) -> str:
    """Why the model lacks a site, as one clause."""
    if site in taps.missing:
        return taps.missing[site]
    if site == "resid_mid":
        return "attention and MLP run in parallel, so there is nothing between them"
    if site in ("attn_proj", "mlp_proj"):
        return f"no norm follows the projection, so it is the same as {site.removesuffix('_proj')}"
    return f"no module was found with these values: {SITES[site].meaning}"


def depends_on_length(loaded: LoadedModel) -> bool:
    """Whether the rotary angles depend on the longest row of a batch."""
    return bool(_LENGTH_SCALINGS & set(_scalings(loaded.model.config.to_dict())))


def _scalings(fields: Any) -> list[str]:
    """Every `rope_type` (or `type`) in a config, at any depth."""
    if not isinstance(fields, Mapping):
        return []
    here = [fields[name] for name in ("rope_type", "type") if isinstance(fields.get(name), str)]
    return here + [scaling for value in fields.values() for scaling in _scalings(value)]
