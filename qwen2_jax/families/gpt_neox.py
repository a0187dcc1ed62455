"""GPT-NeoX and Pythia (`gpt_neox`): LayerNorm, a fused q, k and v, partly rotated heads, parallel or sequential."""

from __future__ import annotations

from core.base.errors import ModelError
from qwen2_jax.activations import ACTIVATIONS
from qwen2_jax.config import DecoderConfig
from qwen2_jax.mapping.hf_config import Fields, choice, count, flag, number, require, whole_quotient
from qwen2_jax.mapping.hf_rope import longest_sample, read_rope
from qwen2_jax.mapping.weight_table import Rows, Stored, WeightTable, plain

LAYER = "gpt_neox.layers.{layer}."
WEIGHTS = plain(
    {
        "embedding": "gpt_neox.embed_in.weight",
        "layers.attn_norm.weight": LAYER + "input_layernorm.weight",
        "layers.attn_norm.bias": LAYER + "input_layernorm.bias",
        "layers.attn.o.weight": LAYER + "attention.dense.weight",
        "layers.attn.o.bias": LAYER + "attention.dense.bias",
        "layers.mlp_norm.weight": LAYER + "post_attention_layernorm.weight",
        "layers.mlp_norm.bias": LAYER + "post_attention_layernorm.bias",
        "layers.mlp.up.weight": LAYER + "mlp.dense_h_to_4h.weight",
        "layers.mlp.up.bias": LAYER + "mlp.dense_h_to_4h.bias",
        "layers.mlp.down.weight": LAYER + "mlp.dense_4h_to_h.weight",
        "layers.mlp.down.bias": LAYER + "mlp.dense_4h_to_h.bias",
        "final_norm.weight": "gpt_neox.final_layer_norm.weight",
        "final_norm.bias": "gpt_neox.final_layer_norm.bias",
        "lm_head.weight": "lm_head.weight",
    }
)
# The head's name in checkpoints of transformers 4.
NEOX_PREFIXES = {"embed_out.": "lm_head."}


def gpt_neox_config(fields: Fields) -> DecoderConfig:
    """A `GPTNeoXConfig` as a `DecoderConfig`."""
    n_heads, n_layers = count(fields, "num_attention_heads"), count(fields, "num_hidden_layers")
    head_dim = whole_quotient(fields, "hidden_size", "num_attention_heads")
    if fields.get("head_dim") not in (None, head_dim):
        raise ModelError(
            f"head_dim {fields['head_dim']} is not hidden_size / num_attention_heads, which GPT-NeoX needs"
        )
    rope = read_rope(
        fields,
        head_dim,
        theta=("rotary_emb_base", "rope_theta"),
        fraction=("rotary_pct",),
        defaults={"rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
    )
    bias = flag(fields, "attention_bias", default=True)
    return DecoderConfig(
        family=require(fields, "model_type"),
        vocab_size=count(fields, "vocab_size"),
        d_model=count(fields, "hidden_size"),
        d_ff=count(fields, "intermediate_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=head_dim,
        norm_eps=number(fields, "layer_norm_eps"),
        rope=rope,
        query_scale=head_dim**-0.5,
        activation=choice(fields, "hidden_act", ACTIVATIONS),
        tie_embeddings=flag(fields, "tie_word_embeddings"),
        windows=(None,) * n_layers,
        max_positions=longest_sample(rope, count(fields, "max_position_embeddings")),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        gated_mlp=False,
        norm="layer",
        parallel=flag(fields, "use_parallel_residual", default=True),
    )


def gpt_neox_weights(config: DecoderConfig) -> WeightTable:
    """q, k and v of one head lie together, head after head."""
    fused = LAYER + "attention.query_key_value."
    size = config.head_dim
    thirds = {param: Rows(i * size, (i + 1) * size, groups=config.n_heads) for i, param in enumerate("qkv")}
    weights = {f"layers.attn.{param}.weight": Stored(fused + "weight", rows) for param, rows in thirds.items()}
    biases = {f"layers.attn.{param}.bias": Stored(fused + "bias", rows) for param, rows in thirds.items()}
    return WEIGHTS | weights | biases
