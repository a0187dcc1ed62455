"""Mistral (`mistral`): Llama without biases, with a window on every layer where `sliding_window` is set."""

from __future__ import annotations

from qwen2_jax.config import DecoderConfig
from qwen2_jax.families.llama import llama_like
from qwen2_jax.mapping.hf_config import Fields, count, optional_count, require_present


def mistral_config(fields: Fields) -> DecoderConfig:
    """A `MistralConfig` as a `DecoderConfig`."""
    require_present(fields, "sliding_window")
    window = optional_count(fields, "sliding_window")
    return llama_like(fields, windows=(window,) * count(fields, "num_hidden_layers"))
