"""Qwen3, dense (`qwen3`): Llama's decoder with a norm over each head of q and k, and Qwen2's windows."""

from __future__ import annotations

from qwen2_jax.config import DecoderConfig
from qwen2_jax.families.llama import QK_NORMS, WEIGHTS, llama_like
from qwen2_jax.families.qwen2 import qwen_windows
from qwen2_jax.mapping.hf_config import Fields, flag, head_dim
from qwen2_jax.mapping.weight_table import WeightTable


def qwen3_config(fields: Fields) -> DecoderConfig:
    """A `Qwen3Config` as a `DecoderConfig`."""
    bias = flag(fields, "attention_bias")
    return llama_like(
        fields,
        head_size=head_dim(fields, default=128),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        windows=qwen_windows(fields),
    )


def qwen3_weights(_: DecoderConfig) -> WeightTable:
    """Llama's names and the two norms'."""
    return WEIGHTS | QK_NORMS
