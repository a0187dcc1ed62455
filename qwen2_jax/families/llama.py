"""Llama 1 to 3.x and SmolLM (`llama`): config and weight names, on which most other families build."""

from __future__ import annotations

from typing import Any

from qwen2_jax.activations import ACTIVATIONS
from qwen2_jax.config import DecoderConfig, RopeConfig
from qwen2_jax.mapping.hf_config import Fields, choice, count, flag, head_dim, kv_heads, number, require
from qwen2_jax.mapping.hf_rope import longest_sample, read_rope
from qwen2_jax.mapping.weight_table import WeightTable, plain

LAYER = "model.layers.{layer}."
ATTENTION = LAYER + "self_attn."
MLP = LAYER + "mlp."
WEIGHTS = plain(
    {
        "embedding": "model.embed_tokens.weight",
        "layers.attn_norm.weight": LAYER + "input_layernorm.weight",
        "layers.attn.q.weight": ATTENTION + "q_proj.weight",
        "layers.attn.q.bias": ATTENTION + "q_proj.bias",
        "layers.attn.k.weight": ATTENTION + "k_proj.weight",
        "layers.attn.k.bias": ATTENTION + "k_proj.bias",
        "layers.attn.v.weight": ATTENTION + "v_proj.weight",
        "layers.attn.v.bias": ATTENTION + "v_proj.bias",
        "layers.attn.o.weight": ATTENTION + "o_proj.weight",
        "layers.attn.o.bias": ATTENTION + "o_proj.bias",
        "layers.mlp_norm.weight": LAYER + "post_attention_layernorm.weight",
        "layers.mlp.gate.weight": MLP + "gate_proj.weight",
        "layers.mlp.gate.bias": MLP + "gate_proj.bias",
        "layers.mlp.up.weight": MLP + "up_proj.weight",
        "layers.mlp.up.bias": MLP + "up_proj.bias",
        "layers.mlp.down.weight": MLP + "down_proj.weight",
        "layers.mlp.down.bias": MLP + "down_proj.bias",
        "final_norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
)
# Norms of queries and keys, in the families that have them.
QK_NORMS = plain(
    {
        "layers.attn.q_norm.weight": ATTENTION + "q_norm.weight",
        "layers.attn.k_norm.weight": ATTENTION + "k_norm.weight",
    }
)


def llama_weights(_: DecoderConfig) -> WeightTable:
    """Llama's names serve Qwen2 and Mistral too."""
    return WEIGHTS


def llama_config(fields: Fields) -> DecoderConfig:
    """A `LlamaConfig` as a `DecoderConfig`."""
    bias = flag(fields, "attention_bias")
    return llama_like(fields, qkv_bias=bias, o_bias=bias, mlp_bias=flag(fields, "mlp_bias"))


def llama_like(
    fields: Fields,
    *,
    head_size: int | None = None,
    rope: RopeConfig | None = None,
    activation: str | None = None,
    tied: bool = False,
    **differences: Any,
) -> DecoderConfig:
    """A config whose sizes have Llama's names, with a block that differs from Llama's in these `DecoderConfig` fields.

    head_size, rope, activation: where they are stated otherwise than by Llama. tied: what an absent
    `tie_word_embeddings` means.
    """
    size = head_size or head_dim(fields)
    rope = rope or read_rope(fields, size)
    n_layers = count(fields, "num_hidden_layers")
    llama: dict[str, Any] = {
        "family": require(fields, "model_type"),
        "vocab_size": count(fields, "vocab_size"),
        "d_model": count(fields, "hidden_size"),
        "d_ff": count(fields, "intermediate_size"),
        "n_layers": n_layers,
        "n_heads": count(fields, "num_attention_heads"),
        "n_kv_heads": kv_heads(fields),
        "head_dim": size,
        "norm_eps": number(fields, "rms_norm_eps"),
        "rope": rope,
        "query_scale": size**-0.5,
        "activation": activation or choice(fields, "hidden_act", ACTIVATIONS),
        "tie_embeddings": flag(fields, "tie_word_embeddings", default=tied),
        "windows": (None,) * n_layers,
        "max_positions": longest_sample(rope, count(fields, "max_position_embeddings")),
    }
    return DecoderConfig(**llama | differences)
