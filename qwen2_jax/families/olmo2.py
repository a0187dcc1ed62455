"""OLMo-2 (`olmo2`): Llama's decoder with norms after attention and MLP only, and over all heads of q and of k."""

from __future__ import annotations

from qwen2_jax.config import DecoderConfig
from qwen2_jax.families.llama import LAYER, QK_NORMS, WEIGHTS, llama_like
from qwen2_jax.mapping.hf_config import Fields, flag
from qwen2_jax.mapping.weight_table import WeightTable, plain


def olmo2_config(fields: Fields) -> DecoderConfig:
    """An `Olmo2Config` as a `DecoderConfig`."""
    bias = flag(fields, "attention_bias")
    return llama_like(
        fields, qkv_bias=bias, o_bias=bias, norm="rms_f32", pre_norm=False, post_norm=True, qk_norm="full"
    )


def olmo2_weights(_: DecoderConfig) -> WeightTable:
    """Llama's names, but for the norms."""
    post_norms = {
        "layers.attn_post_norm.weight": LAYER + "post_attention_layernorm.weight",
        "layers.mlp_post_norm.weight": LAYER + "post_feedforward_layernorm.weight",
    }
    return WEIGHTS | QK_NORMS | plain(post_norms)
