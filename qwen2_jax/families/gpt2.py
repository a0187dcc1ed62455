"""GPT-2 (`gpt2`): LayerNorm, learned positions, a fused q, k and v, and weights stored as (in, out)."""

from __future__ import annotations

from qwen2_jax.activations import ACTIVATIONS
from qwen2_jax.config import DecoderConfig
from qwen2_jax.mapping.hf_config import (
    Fields,
    choice,
    count,
    flag,
    number,
    optional_count,
    require,
    whole_quotient,
    without_effect,
)
from qwen2_jax.mapping.weight_table import Rows, Stored, WeightTable, plain

LAYER = "transformer.h.{layer}."
WEIGHTS = plain(
    {
        "embedding": "transformer.wte.weight",
        "position_embedding": "transformer.wpe.weight",
        "layers.attn_norm.weight": LAYER + "ln_1.weight",
        "layers.attn_norm.bias": LAYER + "ln_1.bias",
        "layers.attn.o.bias": LAYER + "attn.c_proj.bias",
        "layers.mlp_norm.weight": LAYER + "ln_2.weight",
        "layers.mlp_norm.bias": LAYER + "ln_2.bias",
        "layers.mlp.up.bias": LAYER + "mlp.c_fc.bias",
        "layers.mlp.down.bias": LAYER + "mlp.c_proj.bias",
        "final_norm.weight": "transformer.ln_f.weight",
        "final_norm.bias": "transformer.ln_f.bias",
        "lm_head.weight": "lm_head.weight",
    }
) | {
    "layers.attn.o.weight": Stored(LAYER + "attn.c_proj.weight", transposed=True),
    "layers.mlp.up.weight": Stored(LAYER + "mlp.c_fc.weight", transposed=True),
    "layers.mlp.down.weight": Stored(LAYER + "mlp.c_proj.weight", transposed=True),
}


def gpt2_config(fields: Fields) -> DecoderConfig:
    """A `GPT2Config` as a `DecoderConfig`."""
    # n_ctx once sized the causal mask. Attention logits are float32 here with or without reorder_and_upcast_attn.
    without_effect(fields, "n_ctx", "reorder_and_upcast_attn")
    n_heads, n_layers, d_model = (count(fields, name) for name in ("n_head", "n_layer", "n_embd"))
    head_dim = whole_quotient(fields, "n_embd", "n_head")
    return DecoderConfig(
        family=require(fields, "model_type"),
        vocab_size=count(fields, "vocab_size"),
        d_model=d_model,
        d_ff=optional_count(fields, "n_inner") or 4 * d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=head_dim,
        norm_eps=number(fields, "layer_norm_epsilon"),
        rope=None,
        query_scale=head_dim**-0.5 if flag(fields, "scale_attn_weights", default=True) else 1.0,
        scale_by_inverse_layer=flag(fields, "scale_attn_by_inverse_layer_idx"),
        activation=choice(fields, "activation_function", ACTIVATIONS),
        tie_embeddings=flag(fields, "tie_word_embeddings", default=True),
        windows=(None,) * n_layers,
        max_positions=count(fields, "n_positions"),
        learned_positions=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        norm="layer",
    )


def gpt2_weights(config: DecoderConfig) -> WeightTable:
    """q, k and v lie one after the other."""
    fused, width = LAYER + "attn.c_attn.", config.d_model
    thirds = {param: Rows(i * width, (i + 1) * width) for i, param in enumerate("qkv")}
    weights = {
        f"layers.attn.{param}.weight": Stored(fused + "weight", rows, transposed=True) for param, rows in thirds.items()
    }
    biases = {f"layers.attn.{param}.bias": Stored(fused + "bias", rows) for param, rows in thirds.items()}
    return WEIGHTS | weights | biases
