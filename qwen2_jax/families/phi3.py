"""Phi-3, Phi-3.5-mini and Phi-4-mini (`phi3`): Llama's decoder with fused weights and heads that may rotate in part."""

from __future__ import annotations

from collections import ChainMap

from qwen2_jax.config import DecoderConfig
from qwen2_jax.families.llama import ATTENTION, MLP, WEIGHTS, llama_like
from qwen2_jax.mapping.hf_config import Fields, count, head_dim, object_field, optional_count
from qwen2_jax.mapping.hf_rope import read_rope
from qwen2_jax.mapping.weight_table import Rows, Stored, WeightTable


def phi3_config(fields: Fields) -> DecoderConfig:
    """A `Phi3Config` as a `DecoderConfig`."""
    window = optional_count(fields, "sliding_window")
    rope = read_rope(_renamed(fields), head_dim(fields), fraction=("partial_rotary_factor",))
    return llama_like(fields, rope=rope, windows=(window,) * count(fields, "num_hidden_layers"))


def _renamed(fields: Fields) -> Fields:
    """The first releases call longrope `su`, or `yarn` though it is not."""
    scaling = object_field(fields, "rope_scaling")
    named = {name: kind for name, kind in scaling.items() if name in ("type", "rope_type") and kind in ("su", "yarn")}
    return ChainMap({"rope_scaling": scaling | dict.fromkeys(named, "longrope")}, fields)  # type: ignore[arg-type]


def phi3_weights(config: DecoderConfig) -> WeightTable:
    """q, k and v lie one after the other, and so do gate and up."""
    q, kv, d_ff = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.d_ff
    qkv, gate_up = ATTENTION + "qkv_proj.weight", MLP + "gate_up_proj.weight"
    return WEIGHTS | {
        "layers.attn.q.weight": Stored(qkv, Rows(0, q)),
        "layers.attn.k.weight": Stored(qkv, Rows(q, q + kv)),
        "layers.attn.v.weight": Stored(qkv, Rows(q + kv, q + 2 * kv)),
        "layers.mlp.gate.weight": Stored(gate_up, Rows(0, d_ff)),
        "layers.mlp.up.weight": Stored(gate_up, Rows(d_ff, 2 * d_ff)),
    }
