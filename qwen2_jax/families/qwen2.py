"""Qwen2 and Qwen2.5 (`qwen2`): Llama's decoder and weight names with biased q, k and v, and windows on late layers."""

from __future__ import annotations

from core.base.errors import ModelError
from qwen2_jax.config import DecoderConfig
from qwen2_jax.families.llama import llama_like
from qwen2_jax.mapping.hf_config import Fields, count, flag, require, windows_by_type, without_effect


def qwen2_config(fields: Fields) -> DecoderConfig:
    """A `Qwen2Config` as a `DecoderConfig`."""
    count(fields, "num_key_value_heads")
    without_effect(fields, "attention_bias")  # q, k and v are biased, whatever a converter wrote here
    return llama_like(fields, qkv_bias=True, windows=qwen_windows(fields))


def qwen_windows(fields: Fields) -> tuple[int | None, ...]:
    """With use_sliding_window, the layers from `max_window_layers` on slide, unless `layer_types` says which do."""
    n_layers = count(fields, "num_hidden_layers")
    without_effect(fields, "sliding_window", "max_window_layers")  # unless the first of these says so
    window = count(fields, "sliding_window") if flag(fields, "use_sliding_window") else None
    windows = windows_by_type(fields, window, n_layers, switch="use_sliding_window")
    if windows is not None:
        return windows
    first = require(fields, "max_window_layers") if window else n_layers
    if type(first) is not int:
        raise ModelError(f"max_window_layers must be an integer, found {first!r}")
    return tuple(window if layer >= first else None for layer in range(n_layers))
