"""Rotary frequencies against transformers' own buffers, at the sizes of published models."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qwen2_jax.hf_config import read_rope
from qwen2_jax.rope import rotary_frequencies, rotary_tables

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "Qwen2.5": (Qwen2Config, 64, {"rope_type": "default", "rope_theta": 1e6}),
    "Qwen2.5 long": (
        Qwen2Config,
        128,
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "Llama 3.1": (
        LlamaConfig,
        128,
        LLAMA3 | {"rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192},
    ),
    "Llama 3.2": (
        LlamaConfig,
        64,
        LLAMA3 | {"rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192},
    ),
    "SmolLM2": (LlamaConfig, 64, {"rope_type": "default", "rope_theta": 1e5}),
    "linear": (LlamaConfig, 128, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "yarn from the model's own maximum": (
        LlamaConfig,
        64,
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mscale": 0.7, "mscale_all_dim": 1.1},
    ),
}


@pytest.mark.parametrize(("kind", "head_dim", "rope"), ROPES.values(), ids=ROPES)
def test_angles_at_32k_positions_match_transformers(kind, head_dim, rope):
    config = kind(hidden_size=head_dim * 2, num_attention_heads=2, num_key_value_heads=2, rope_parameters=rope)
    reference = LlamaRotaryEmbedding(config)
    ours = read_rope(config.to_dict())
    np.testing.assert_allclose(rotary_frequencies(ours, head_dim), reference.inv_freq.numpy(), rtol=2e-7)
    positions = np.array([[0, 1, 17, 2047]])
    cos, sin = rotary_tables(ours, head_dim, positions, np.float32)
    theirs = reference(torch.zeros(1), torch.tensor(positions))
    for table, expected in zip((cos, sin), theirs, strict=True):
        np.testing.assert_allclose(table, expected.numpy()[..., : head_dim // 2], atol=2e-4)


REFUSED = {
    "rope_theta is missing": {},
    "two values of rope_theta": {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
    "disagree": {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "'longrope' is not supported": {"rope_theta": 1e4, "rope_scaling": {"type": "longrope"}},
    "factor is missing": {"rope_theta": 1e4, "rope_scaling": {"type": "linear"}},
    "mrope_section is not supported": {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 2]}},
    "partial_rotary_factor is not supported": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}


@pytest.mark.parametrize(("message", "fields"), REFUSED.items(), ids=REFUSED)
def test_rope_settings_that_are_not_understood_are_refused(message, fields):
    with pytest.raises(Exception, match=message) as refusal:
        read_rope(fields)
    assert type(refusal.value).__name__ == "ModelError"
