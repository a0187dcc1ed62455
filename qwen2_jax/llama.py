"""Llama 1 to 3.x, SmolLM2 (`llama`) and Mistral (`mistral`): config and weight names as transformers publishes them."""

from __future__ import annotations

import dataclasses

from qwen2_jax.config import DecoderConfig
from qwen2_jax.decoder import ACTIVATIONS
from qwen2_jax.hf_config import Fields, choice, count, flag, head_dim, number, read_rope, require

LAYER = "model.layers.{layer}."
# One name per tensor of the checkpoint and the parameter it becomes. Rows of a bias the config lacks do not apply.
WEIGHTS = {
    "model.embed_tokens.weight": "embedding",
    LAYER + "input_layernorm.weight": "layers.attn_norm",
    LAYER + "self_attn.q_proj.weight": "layers.q",
    LAYER + "self_attn.q_proj.bias": "layers.q_bias",
    LAYER + "self_attn.k_proj.weight": "layers.k",
    LAYER + "self_attn.k_proj.bias": "layers.k_bias",
    LAYER + "self_attn.v_proj.weight": "layers.v",
    LAYER + "self_attn.v_proj.bias": "layers.v_bias",
    LAYER + "self_attn.o_proj.weight": "layers.o",
    LAYER + "self_attn.o_proj.bias": "layers.o_bias",
    LAYER + "post_attention_layernorm.weight": "layers.mlp_norm",
    LAYER + "mlp.gate_proj.weight": "layers.gate",
    LAYER + "mlp.gate_proj.bias": "layers.gate_bias",
    LAYER + "mlp.up_proj.weight": "layers.up",
    LAYER + "mlp.up_proj.bias": "layers.up_bias",
    LAYER + "mlp.down_proj.weight": "layers.down",
    LAYER + "mlp.down_proj.bias": "layers.down_bias",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "lm_head",
}


def llama_config(fields: Fields) -> DecoderConfig:
    """A `LlamaConfig` as a `DecoderConfig`."""
    n_heads, n_layers = count(fields, "num_attention_heads"), count(fields, "num_hidden_layers")
    bias = flag(fields, "attention_bias")
    return DecoderConfig(
        family=require(fields, "model_type"),
        vocab_size=count(fields, "vocab_size"),
        d_model=count(fields, "hidden_size"),
        d_ff=count(fields, "intermediate_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads if fields.get("num_key_value_heads") is None else count(fields, "num_key_value_heads"),
        head_dim=head_dim(fields),
        norm_eps=number(fields, "rms_norm_eps"),
        rope=read_rope(fields),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=flag(fields, "mlp_bias"),
        tie_embeddings=flag(fields, "tie_word_embeddings"),
        windows=(None,) * n_layers,
        max_positions=count(fields, "max_position_embeddings"),
        activation=choice(fields, "hidden_act", ACTIVATIONS),
    )


def mistral_config(fields: Fields) -> DecoderConfig:
    """Llama without biases, where `sliding_window`, when set, holds on every layer."""
    config = llama_config(fields)
    window = None if fields.get("sliding_window") is None else count(fields, "sliding_window")
    return dataclasses.replace(config, windows=(window,) * config.n_layers)
