"""Gemma 3: the text models (`gemma3_text`) and the text decoder of the multimodal ones (`gemma3`)."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from typing import Any

from core.base.errors import ModelError
from qwen2_jax.config import DecoderConfig, RopeConfig
from qwen2_jax.families.gemma2 import SANDWICH_NORMS, sandwich_gemma
from qwen2_jax.families.llama import QK_NORMS, WEIGHTS
from qwen2_jax.mapping.hf_config import (
    Fields,
    count,
    flag,
    head_dim,
    object_field,
    optional_count,
    read_all,
    require,
    without_effect,
)
from qwen2_jax.mapping.hf_rope import read_rope
from qwen2_jax.mapping.weight_table import WeightTable

# The published multimodal files state only what differs from these, the defaults of `Gemma3TextConfig`.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}
# What the vision tower is fed and where its output goes; no text token depends on it.
IMAGE_FIELDS = ("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index")
# Checkpoints of transformers before 4.52 and after.
MULTIMODAL_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
VISION = (r"^(model\.)?vision_tower\.", r"^(model\.)?multi_modal_projector\.")


def gemma3_text_config(fields: Fields) -> DecoderConfig:
    """A `Gemma3TextConfig` as a `DecoderConfig`."""
    # transformers reads this one and applies it in no version; a model that agrees with it does not either.
    without_effect(fields, "attn_logit_softcapping")
    known: Fields = ChainMap(fields, DEFAULTS)  # type: ignore[arg-type]  # only read
    rope, local_rope = _ropes(known)
    return sandwich_gemma(
        known,
        optional_count(known, "sliding_window"),
        pattern=count(known, "sliding_window_pattern"),
        qk_norm="head",
        rope=rope,
        local_rope=local_rope,
    )


def gemma3_config(fields: Fields) -> DecoderConfig:
    """The text part of a `Gemma3Config` as a `DecoderConfig`.

    transformers caps the logits of `Gemma3ForCausalLM`, not those of `Gemma3ForConditionalGeneration`; so do we.
    """
    without_effect(fields, *IMAGE_FIELDS)
    require(fields, "text_config")
    text = object_field(fields, "text_config")
    if len({flag(place, "tie_word_embeddings", default=True) for place in (fields, text)}) > 1:
        raise ModelError("tie_word_embeddings differs between the config and its text_config; make them agree")
    try:
        config = read_all(gemma3_text_config, text | {"model_type": require(fields, "model_type")})
    except ModelError as error:
        raise type(error)(f"text_config: {error}") from error
    return dataclasses.replace(config, final_softcap=None)


def gemma3_weights(_: DecoderConfig) -> WeightTable:
    """Gemma 2's names and those of the norms of q and k."""
    return WEIGHTS | SANDWICH_NORMS | QK_NORMS


def _ropes(fields: Fields) -> tuple[RopeConfig, RopeConfig]:
    """Of the layers that see everything and of those that slide.

    transformers 5 nests `rope_parameters` by layer type; 4 has `rope_theta` and `rope_scaling` for the first kind and
    `rope_local_base_freq` for the second.
    """
    size = head_dim(fields)
    nested = object_field(fields, "rope_parameters")
    if unknown := sorted(nested.keys() - {"full_attention", "sliding_attention"}):
        raise ModelError(f"rope_parameters must hold full_attention and sliding_attention, found {unknown[0]!r}")
    common = {"max_position_embeddings": count(fields, "max_position_embeddings")}
    full = common | {name: fields.get(name) for name in ("rope_theta", "rope_scaling")}
    local = common | {"rope_local_base_freq": fields.get("rope_local_base_freq")}
    return (
        read_rope(full | _of_type(nested, "full_attention"), size, defaults={"rope_theta": 1e6}),
        read_rope(
            local | _of_type(nested, "sliding_attention"),
            size,
            theta=("rope_local_base_freq",),
            defaults={"rope_theta": 1e4},
        ),
    )


def _of_type(nested: dict[str, Any], layer_type: str) -> dict[str, Any]:
    return {"rope_parameters": object_field(nested, layer_type)}
