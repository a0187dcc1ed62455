"""Tiny random models against transformers' eager attention in float32: every layer, every site."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_reference import SIZES, everything, forward, hf_activations, save, tiny_model, worst_token
from transformers import LlamaConfig, MistralConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qwen2_jax import SITES, Capture, ModelError, load_config, load_model
from qwen2_jax.decoder import rms_norm

TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 48))
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}


def qwen2(heads: int, kv_heads: int, **settings) -> Qwen2Config:
    settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}} | settings
    return Qwen2Config(
        **SIZES, hidden_size=heads * 8, num_attention_heads=heads, num_key_value_heads=kv_heads, **settings
    )


def llama(kind=LlamaConfig, **settings) -> LlamaConfig:
    settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} | settings
    return kind(**SIZES, hidden_size=48, num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=1e-5, **settings)


CASES = {
    "qwen2 tied, 7 heads on 1": qwen2(7, 1, tie_word_embeddings=True),
    "qwen2 untied, 14 heads on 2": qwen2(14, 2),
    "qwen2 5 heads, no grouping": qwen2(5, 5),
    "qwen2 windows on the last layers": qwen2(6, 2, **WINDOW),
    "qwen2 windows by layer type": qwen2(
        6, 2, **WINDOW, layer_types=["sliding_attention", "full_attention"] * (SIZES["num_hidden_layers"] // 2)
    ),
    "qwen2 yarn": qwen2(6, 2, rope_parameters=YARN),
    "qwen2 yarn, all numbers": qwen2(
        6, 2, rope_parameters=YARN | {"beta_fast": 8, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.9}
    ),
    "qwen2 yarn, attention factor": qwen2(6, 2, rope_parameters=YARN | {"attention_factor": 1.3, "truncate": False}),
    "llama": llama(),
    "llama llama3 rope": llama(rope_parameters=LLAMA3),
    "llama linear rope": llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    "llama all biases": llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, hidden_act="gelu_new"),
    "llama head_dim apart": llama(head_dim=12),
    "llama tanh gelu": llama(hidden_act="gelu_pytorch_tanh"),
    "llama gelu": llama(hidden_act="gelu"),
    "mistral window": llama(MistralConfig, sliding_window=7),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_every_site_of_every_layer_matches_transformers(config, tmp_path):
    model = tiny_model(config)
    decoder = load_model(str(save(model, tmp_path)))
    theirs = hf_activations(model, TOKENS)
    ours = forward(decoder, TOKENS, everything(decoder))
    assert set(ours) == {*SITES, "logits"}
    for site in ours:
        assert worst_token(ours[site], theirs[site]) < 1e-5, site


SPELLINGS = {
    "theta beside": (qwen2(6, 2), {"rope_parameters": None, "rope_theta": 1e6}),
    "llama3": (
        llama(rope_parameters=LLAMA3),
        {
            "rope_parameters": None,
            "rope_theta": 5e5,
            "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
        },
    ),
    "type for rope_type": (
        llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
        {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 3.0}},
    ),
}


@pytest.mark.parametrize(("config", "old_spelling"), SPELLINGS.values(), ids=SPELLINGS)
def test_transformers_4_rope_spelling_reads_as_that_of_5(config, old_spelling, tmp_path):
    model = tiny_model(config)
    new = load_config(str(save(model, tmp_path / "new")))
    old = load_config(str(save(model, tmp_path / "old", **old_spelling)))
    assert old == new
    assert old.rope.theta == config.rope_parameters["rope_theta"]


def test_the_window_of_the_parity_cases_bites(tmp_path):
    model = tiny_model(CASES["qwen2 windows on the last layers"])
    windowed = load_model(str(save(model, tmp_path / "windowed")))
    assert windowed.config.windows == (None, None, 5, 5)
    assert load_config(str(save(model, tmp_path / "old", layer_types=None))) == windowed.config
    full = load_model(str(save(model, tmp_path / "full", use_sliding_window=False, layer_types=None)))
    ours, without = (forward(decoder, TOKENS, everything(decoder))["residual"] for decoder in (windowed, full))
    assert worst_token(ours[1], without[1]) < 1e-6
    assert worst_token(ours[2], without[2]) > 0.1


def test_the_last_residual_is_before_the_final_norm(tmp_path):
    model = tiny_model(CASES["llama"])
    decoder = load_model(str(save(model, tmp_path)))
    last = forward(decoder, TOKENS, Capture((3,)))["residual"][0]
    with torch.no_grad():
        hidden_states = model(torch.asarray(TOKENS), output_hidden_states=True).hidden_states
        normed = model.model.norm(torch.tensor(last)).numpy()
    assert worst_token(normed, hidden_states[-1].numpy()) < 1e-5
    assert worst_token(last, hidden_states[-1].numpy()) > 0.1


def test_bfloat16_is_no_further_from_float32_than_transformers_is(tmp_path):
    model = tiny_model(CASES["llama"])
    exact = hf_activations(model, TOKENS)
    decoder = load_model(str(save(model, tmp_path)), dtype="bfloat16")
    theirs = hf_activations(model.to(torch.bfloat16), TOKENS)
    ours = forward(decoder, TOKENS, everything(decoder))
    assert decoder.embedding.dtype == "bfloat16"
    for site in SITES:
        our_error, their_error = (np.linalg.norm(found[site] - exact[site]) for found in (ours, theirs))
        assert 0 < our_error < 1.2 * their_error, site


def test_bfloat16_norm_rounds_where_transformers_does():
    x, weight = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((1, 50, 64), (64,)))
    reference = LlamaRMSNorm(64, eps=1e-5)
    reference.weight.data = weight
    ours = rms_norm(*(jnp.asarray(each.float().numpy(), jnp.bfloat16) for each in (x, weight)), 1e-5)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), reference(x).detach().float().numpy())


def test_rope_kinds_that_are_not_implemented_are_refused_by_name(tmp_path):
    model = tiny_model(CASES["llama"])
    edit = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    with pytest.raises(ModelError, match="'dynamic' is not supported; supported are default, linear, llama3, yarn"):
        load_config(str(save(model, tmp_path, **edit)))
