"""Rotary frequencies against transformers' own buffers, at the sizes of published models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTNeoXConfig, LlamaConfig, Phi3Config, Qwen2Config
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from core.base.errors import ModelError
from qwen2_jax.config import FrequencyDivisors, RopeConfig
from qwen2_jax.mapping.hf_rope import read_rope
from qwen2_jax.rope import rotary_frequencies, rotary_tables, rotate, sample_lengths

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def longrope(pairs: int, **more: object) -> dict:
    short, long = np.random.default_rng(0).uniform(1, 8, (2, pairs)).round(4).tolist()
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long}
    return rope | {"original_max_position_embeddings": 4096} | more


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
    "Pythia": (
        GPTNeoXConfig,
        128,
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    ),
    "an odd part of the head": (
        GPTNeoXConfig,
        20,
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    ),
    "dynamic, short": (LlamaConfig, 64, DYNAMIC),
    "longrope, short, factor": (LlamaConfig, 64, longrope(32, factor=16.0)),
    "longrope, attention factor": (LlamaConfig, 64, longrope(32, attention_factor=1.25)),
    "Phi-4-mini": (Phi3Config, 128, longrope(48, partial_rotary_factor=0.75)),
}
REFERENCES = {LlamaConfig: LlamaRotaryEmbedding, Qwen2Config: LlamaRotaryEmbedding}
REFERENCES |= {GPTNeoXConfig: GPTNeoXRotaryEmbedding, Phi3Config: Phi3RotaryEmbedding}


def reference_and_ours(kind, head_dim, rope) -> tuple[torch.nn.Module, RopeConfig]:
    sizes = {"hidden_size": head_dim * 2, "num_attention_heads": 2, "max_position_embeddings": 131072}
    if kind is not GPTNeoXConfig:
        sizes["num_key_value_heads"] = 2
    config = kind(**sizes, rope_parameters=dict(rope))
    return REFERENCES[kind](config), read_rope(config.to_dict(), head_dim, fraction=("partial_rotary_factor",))


@pytest.mark.parametrize(("kind", "head_dim", "rope"), ROPES.values(), ids=ROPES)
def test_angles_match_transformers(kind, head_dim, rope):
    reference, ours = reference_and_ours(kind, head_dim, rope)
    np.testing.assert_allclose(rotary_frequencies(ours), reference.inv_freq.numpy(), rtol=2e-7)
    positions = jnp.array([[0, 1, 17, 2047]])
    cos, sin = rotary_tables(ours, positions, jnp.ones_like(positions))
    theirs = reference(torch.zeros(1), torch.tensor(np.asarray(positions)))
    for table, expected in zip((cos, sin), theirs, strict=True):
        np.testing.assert_allclose(table, expected.numpy()[..., : cos.shape[-1]], atol=2e-4)


BY_LENGTH = {
    "dynamic": (LlamaConfig, DYNAMIC, 131072),
    "longrope": (LlamaConfig, longrope(32), 4096),
    "Phi-3": (Phi3Config, longrope(32), 4096),
}


@pytest.mark.parametrize(("kind", "rope", "original"), BY_LENGTH.values(), ids=BY_LENGTH)
@pytest.mark.parametrize("beyond", [0, 1, 1000])
def test_frequencies_that_go_by_length_match_transformers_on_both_sides_of_the_limit(kind, rope, original, beyond):
    reference, ours = reference_and_ours(kind, 64, rope)
    length = original + beyond
    reference(torch.zeros(1), torch.arange(length)[None])
    np.testing.assert_allclose(rotary_frequencies(ours, length), reference.inv_freq.numpy(), rtol=3e-7)
    assert (rotary_frequencies(ours, length) == rotary_frequencies(ours)).all() == (beyond == 0)


def test_each_token_of_a_row_rotates_as_its_own_sample_does():
    for rope in (longrope(32), DYNAMIC):
        fields = {"rope_parameters": rope | {"original_max_position_embeddings": 8}, "max_position_embeddings": 8}
        if rope is DYNAMIC:
            fields["rope_parameters"] = rope
        ours = read_rope(fields, 64)
        segments = np.array([[1] * 8 + [2] * 9 + [0] * 3, [1] * 20])
        positions = np.array([[*range(8), *range(9), 0, 0, 0], list(range(20))])
        cos, _ = rotary_tables(ours, jnp.asarray(positions), jnp.asarray(segments))
        for row, span, length in ((0, slice(0, 8), 8), (0, slice(8, 17), 9), (1, slice(0, 20), 20)):
            alone = positions[row, span, None].astype(np.float32) * rotary_frequencies(ours, length)
            scale = getattr(ours.scaling, "attention_factor", 1.0)
            np.testing.assert_allclose(cos[row, span], np.cos(alone) * scale, atol=1e-6)


@given(st.lists(st.integers(1, 5), max_size=6))
@settings(max_examples=50, deadline=None)
def test_the_length_of_a_sample_is_known_to_each_of_its_tokens(lengths):
    padding = [0] * (30 - sum(lengths))
    segments = [number for number, length in enumerate(lengths, start=1) for _ in range(length)] + padding
    positions = [place for length in lengths for place in range(length)] + padding
    found = sample_lengths(jnp.array([positions], np.int32), jnp.array([segments], np.int32))
    assert np.asarray(found)[0, : sum(lengths)].tolist() == [length for length in lengths for _ in range(length)]


def test_frequencies_that_do_not_go_by_length_are_constants_of_the_program():
    positions = jax.ShapeDtypeStruct((2, 24), np.int32)
    for rope, gathers in ((longrope(32), 0), (longrope(32, original_max_position_embeddings=8), 1)):
        ours = read_rope({"rope_parameters": rope, "max_position_embeddings": 4096}, 64)
        jaxpr = jax.make_jaxpr(lambda p, s, rope=ours: rotary_tables(rope, p, s))(positions, positions)
        assert str(jaxpr).count("gather[") == gathers


def test_dimensions_beyond_the_rotated_ones_pass_unchanged():
    rope = RopeConfig(1e4, 6)
    positions = jnp.arange(4)[None]
    x = np.random.default_rng(0).normal(size=(1, 4, 2, 10)).astype(np.float32)
    out = rotate(jnp.asarray(x), rotary_tables(rope, positions, jnp.ones_like(positions)))
    np.testing.assert_array_equal(out[..., 6:], x[..., 6:])
    as_complex = (x[..., :3] + 1j * x[..., 3:6]) * np.exp(1j * positions[0, :, None, None] * rotary_frequencies(rope))
    np.testing.assert_allclose(out[..., :6], np.concatenate([as_complex.real, as_complex.imag], -1), atol=1e-6)


def test_divisors_of_a_gguf_file_divide_the_frequencies():
    plain, divisors = RopeConfig(1e4, 8), (1.0, 2.0, 4.0, 8.0)
    divided = RopeConfig(1e4, 8, FrequencyDivisors(divisors))
    np.testing.assert_allclose(rotary_frequencies(divided) * divisors, rotary_frequencies(plain), rtol=1e-6)


REFUSED = {
    "rope_theta is missing": {},
    "two values of rope_theta": {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
    "disagree": {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope_type and type disagree": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "rope_type": "yarn"}},
    "'proportional' is not supported; supported are default, linear, dynamic, llama3, yarn, longrope": {
        "rope_theta": 1e4,
        "rope_scaling": {"type": "proportional"},
    },
    "factor is missing": {"rope_theta": 1e4, "rope_scaling": {"type": "linear"}},
    "short_factor must be a list of 4 numbers, one for each rotary pair; found 3": {
        "rope_theta": 1e4,
        "max_position_embeddings": 8,
        "rope_scaling": {"type": "longrope", "short_factor": [1, 1, 1]},
    },
    "short_factor must be a positive number, found 'x'": {
        "rope_theta": 1e4,
        "max_position_embeddings": 8,
        "rope_scaling": {"type": "longrope", "short_factor": ["x"] * 4},
    },
    "short_mscale is not supported with rope type 'longrope'": {
        "rope_theta": 1e4,
        "rope_scaling": {"type": "longrope", "short_mscale": 1.1},
    },
    "mrope_section is not supported": {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 2]}},
    "partial_rotary_factor 0.5 is not supported; here all of each head rotates": {
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
}


@pytest.mark.parametrize(("message", "fields"), REFUSED.items(), ids=REFUSED)
def test_rope_settings_that_are_not_understood_are_refused(message, fields):
    with pytest.raises(ModelError, match=message):
        read_rope(fields, 8)


def test_a_head_of_odd_size_cannot_rotate_as_a_whole():
    with pytest.raises(ModelError, match="9 of 9 dimensions of each head would rotate; they rotate in pairs"):
        read_rope({"rope_theta": 1e4}, 9)
