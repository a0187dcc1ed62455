"""Qwen2 and Qwen2.5: Llama's decoder and weight names with biased q, k and v."""

from __future__ import annotations

import dataclasses

from qwen2_jax.config import DecoderConfig
from qwen2_jax.errors import ModelError
from qwen2_jax.hf_config import Fields, count, flag, require
from qwen2_jax.llama import llama_config


def qwen2_config(fields: Fields) -> DecoderConfig:
    """A `Qwen2Config` as a `DecoderConfig`."""
    count(fields, "num_key_value_heads")
    config = llama_config(fields)
    return dataclasses.replace(
        config, qkv_bias=True, o_bias=False, mlp_bias=False, windows=_windows(fields, config.n_layers)
    )


def _windows(fields: Fields, n_layers: int) -> tuple[int | None, ...]:
    """With use_sliding_window, the layers from `max_window_layers` on slide, unless `layer_types` says which do."""
    window = count(fields, "sliding_window") if flag(fields, "use_sliding_window") else None
    kinds = fields.get("layer_types")
    if kinds is None:
        first = require(fields, "max_window_layers") if window else n_layers
        if type(first) is not int:
            raise ModelError(f"max_window_layers must be an integer, found {first!r}")
        return tuple(window if layer >= first else None for layer in range(n_layers))
    if not isinstance(kinds, list):
        raise ModelError(f"layer_types must be a JSON list, found {kinds!r}")
    if len(kinds) != n_layers:
        raise ModelError(f"layer_types has {len(kinds)} entries for {n_layers} layers")
    if unknown := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
        raise ModelError(f"layer type {unknown[0]!r} is not supported")
    if "sliding_attention" in kinds and window is None:
        raise ModelError("layer_types slides but use_sliding_window is not set; make them agree")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
