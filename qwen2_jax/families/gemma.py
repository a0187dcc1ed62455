"""Gemma 1 (`gemma`): Llama's decoder with scaled embeddings, norms that multiply by 1 + weight, and a tanh GELU."""

from __future__ import annotations

from typing import Any

from core.base.errors import ModelError
from qwen2_jax.activations import ACTIVATIONS
from qwen2_jax.config import DecoderConfig
from qwen2_jax.families.llama import WEIGHTS, llama_like
from qwen2_jax.mapping.hf_config import Fields, choice, count, flag, head_dim
from qwen2_jax.mapping.weight_table import WeightTable


def gemma_config(fields: Fields) -> DecoderConfig:
    """A `GemmaConfig` as a `DecoderConfig`."""
    return gemma_like(fields, activation=_activation(fields))


def gemma_like(fields: Fields, **differences: Any) -> DecoderConfig:
    """What the three generations of Gemma share, and the `DecoderConfig` fields in which one differs."""
    bias = flag(fields, "attention_bias")
    gemma = {
        "head_size": head_dim(fields, default=256),
        "tied": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "norm": "rms_plus_one",
        "embedding_scale": count(fields, "hidden_size") ** 0.5,
    }
    return llama_like(fields, **gemma | differences)


def gemma_weights(_: DecoderConfig) -> WeightTable:
    """Llama's names."""
    return WEIGHTS


def _activation(fields: Fields) -> str:
    """The first release says `gelu` and means the tanh approximation; later files add `hidden_activation` to say so."""
    stated = {name: fields.get(name) for name in ("hidden_activation", "hidden_act")}
    meant = {"gelu_pytorch_tanh" if value == "gelu" else value for value in stated.values() if value is not None}
    if len(meant) > 1:
        raise ModelError(f"hidden_act and hidden_activation disagree, {sorted(map(str, meant))}; keep the right one")
    return choice({"hidden_act": meant.pop() if meant else None}, "hidden_act", ACTIVATIONS)
