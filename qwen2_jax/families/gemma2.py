"""Gemma 2 (`gemma2`): four norms a block, windows on every other layer, capped logits."""

from __future__ import annotations

from typing import Any

from core.base.errors import ModelError
from qwen2_jax.activations import ACTIVATIONS
from qwen2_jax.config import DecoderConfig
from qwen2_jax.families.gemma import gemma_like
from qwen2_jax.families.llama import LAYER, WEIGHTS
from qwen2_jax.mapping.hf_config import (
    Fields,
    choice,
    count,
    number,
    optional_count,
    optional_number,
    require_present,
    windows_by_type,
)
from qwen2_jax.mapping.weight_table import WeightTable, plain

SANDWICH_NORMS = plain(
    {
        "layers.attn_norm.weight": LAYER + "input_layernorm.weight",
        "layers.attn_post_norm.weight": LAYER + "post_attention_layernorm.weight",
        "layers.mlp_norm.weight": LAYER + "pre_feedforward_layernorm.weight",
        "layers.mlp_post_norm.weight": LAYER + "post_feedforward_layernorm.weight",
    }
)


def gemma2_config(fields: Fields) -> DecoderConfig:
    """A `Gemma2Config` as a `DecoderConfig`."""
    require_present(fields, "sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    window = optional_count(fields, "sliding_window")
    if fields.get("sliding_window_size") not in (None, window):
        raise ModelError("sliding_window_size and sliding_window disagree; keep the one that is right")
    return sandwich_gemma(fields, window, pattern=2, attn_softcap=optional_number(fields, "attn_logit_softcapping"))


def sandwich_gemma(fields: Fields, window: int | None, *, pattern: int, **differences: Any) -> DecoderConfig:
    """What Gemma 2 and 3 share. pattern: without `layer_types`, all layers but each `pattern`-th slide."""
    n_layers = count(fields, "num_hidden_layers")
    windows = windows_by_type(fields, window, n_layers)
    if windows is None:
        windows = tuple(window if (layer + 1) % pattern else None for layer in range(n_layers))
    activation = choice(fields, "hidden_activation", ACTIVATIONS)
    # Some files have Gemma 1's name of it too, which transformers does not look at.
    if fields.get("hidden_act") not in (None, activation):
        raise ModelError("hidden_act and hidden_activation disagree; keep the one that is right")
    sandwich = {
        "activation": activation,
        "windows": windows,
        "query_scale": number(fields, "query_pre_attn_scalar") ** -0.5,
        "post_norm": True,
        "final_softcap": optional_number(fields, "final_logit_softcapping"),
    }
    return gemma_like(fields, **sandwich | differences)


def gemma2_weights(_: DecoderConfig) -> WeightTable:
    """Llama's names, but for the norms."""
    return WEIGHTS | SANDWICH_NORMS
