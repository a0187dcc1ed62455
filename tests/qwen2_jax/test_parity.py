"""Tiny random models against transformers' eager attention in float32: every family, layer and site."""

import copy
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from flax import nnx
from hf_reference import SIZES, everything, forward, hf_activations, save, tiny_model, worst_token
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from qwen2_jax import Capture, Decoder, load_model
from qwen2_jax.families import FAMILIES

LENGTH = 48
TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, LENGTH))
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
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
SLIDING, FULL = "sliding_attention", "full_attention"


def llama(kind=LlamaConfig, heads=6, kv_heads=2, **settings) -> PreTrainedConfig:
    sizes = SIZES | {"hidden_size": heads * 8, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return kind(**sizes | {"rms_norm_eps": 1e-5, "rope_parameters": DEFAULT} | settings)


qwen2 = functools.partial(llama, Qwen2Config)
qwen3 = functools.partial(llama, Qwen3Config, head_dim=12)
gemma = functools.partial(llama, GemmaConfig, head_dim=12)
gemma2 = functools.partial(
    llama,
    Gemma2Config,
    head_dim=12,
    sliding_window=5,
    query_pre_attn_scalar=20,
    attn_logit_softcapping=1.5,
    final_logit_softcapping=2.0,
)
GEMMA3_ROPE = {FULL: LINEAR | {"rope_theta": 1e6}, SLIDING: DEFAULT}
gemma3 = functools.partial(
    llama,
    Gemma3TextConfig,
    head_dim=12,
    sliding_window=5,
    sliding_window_pattern=3,
    query_pre_attn_scalar=20,
    final_logit_softcapping=2.0,
    rope_parameters=GEMMA3_ROPE,
)
phi3 = functools.partial(llama, Phi3Config, pad_token_id=0)


def longrope(rotary_dim: int, original: int) -> dict:
    """Phi-3 says the original length beside the rotary settings."""
    factors = np.random.default_rng(3).uniform(1, 4, (2, rotary_dim // 2)).round(3).tolist()
    rope = DEFAULT | {"rope_type": "longrope", "short_factor": factors[0], "long_factor": factors[1]}
    return {"original_max_position_embeddings": original, "rope_parameters": rope}


def gpt_neox(rotary: float = 0.25, heads: int = 6, rope: dict = DEFAULT, **settings) -> GPTNeoXConfig:
    rope = rope | {"partial_rotary_factor": rotary}
    return GPTNeoXConfig(**SIZES, hidden_size=48, num_attention_heads=heads, rope_parameters=rope, **settings)


def gpt2(**settings) -> GPT2Config:
    return GPT2Config(vocab_size=97, n_positions=64, n_embd=48, n_layer=4, n_head=6, **settings)


def multimodal_gemma3() -> Gemma3Config:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3Config(text_config=gemma3().to_dict(), vision_config=vision | {"image_size": 28, "patch_size": 14})


CASES = {
    "qwen2 tied, 7 heads on 1": qwen2(heads=7, kv_heads=1, tie_word_embeddings=True),
    "qwen2 untied, 14 heads on 2": qwen2(heads=14),
    "qwen2 5 heads, no grouping": qwen2(heads=5, kv_heads=5),
    "qwen2 windows on the last layers": qwen2(**WINDOW),
    "qwen2 windows by layer type": qwen2(**WINDOW, layer_types=[SLIDING, FULL] * 2),
    "qwen2 yarn": qwen2(rope_parameters=YARN),
    "qwen2 yarn, all numbers": qwen2(
        rope_parameters=YARN | {"beta_fast": 8, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.9}
    ),
    "qwen2 yarn, attention factor": qwen2(rope_parameters=YARN | {"attention_factor": 1.3, "truncate": False}),
    "qwen3": qwen3(),
    "qwen3 tied, biased, windows": qwen3(**WINDOW, attention_bias=True, tie_word_embeddings=True),
    "llama": llama(),
    "llama llama3 rope": llama(rope_parameters=LLAMA3),
    "llama linear rope": llama(rope_parameters=LINEAR),
    "llama dynamic rope": llama(rope_parameters=LINEAR | {"rope_type": "dynamic"}, max_position_embeddings=20),
    "llama longrope": llama(**longrope(8, 20)),
    "llama all biases": llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, hidden_act="gelu_new"),
    "llama head_dim apart": llama(head_dim=14, hidden_act="relu"),
    "llama one head": llama(heads=1, kv_heads=1, hidden_act="gelu_pytorch_tanh"),
    "mistral window": llama(MistralConfig, sliding_window=7, hidden_act="gelu"),
    "gemma, first release": gemma(hidden_act="gelu"),
    "gemma biased, one kv head": gemma(kv_heads=1, attention_bias=True),
    "gemma2": gemma2(),
    "gemma2 untied, biased, no caps": gemma2(
        attention_bias=True,
        tie_word_embeddings=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        layer_types=[FULL, FULL, SLIDING, FULL],
    ),
    "gemma3": gemma3(),
    "gemma3 yarn, by layer type": gemma3(
        layer_types=[FULL, SLIDING] * 2,
        rope_parameters={FULL: YARN, SLIDING: DEFAULT | {"rope_theta": 300.0}},
        attn_logit_softcapping=1.5,  # which transformers applies to Gemma-2 alone
    ),
    "gemma3 multimodal": multimodal_gemma3(),
    "gpt_neox": gpt_neox(rotary=0.5),
    "gpt_neox sequential, tied, no bias": gpt_neox(
        use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True
    ),
    "gpt_neox whole rotation": gpt_neox(rotary=1.0, rope=LINEAR),
    "gpt_neox odd rotation": gpt_neox(heads=4, hidden_act="gelu_fast"),
    "gpt2": gpt2(),
    "gpt2 untied, scaled by layer": gpt2(
        scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True, tie_word_embeddings=False, n_inner=52
    ),
    "gpt2 unscaled": gpt2(scale_attn_weights=False, activation_function="tanh"),
    "phi3 window": phi3(sliding_window=9, kv_heads=6),
    "phi3 longrope, long": phi3(**longrope(8, 20)),
    "phi3 longrope, short, attention factor": phi3(
        original_max_position_embeddings=64,
        rope_parameters=longrope(8, 64)["rope_parameters"] | {"attention_factor": 1.3},
    ),
    "phi3 partly rotated, tied": phi3(
        original_max_position_embeddings=20,
        rope_parameters=longrope(6, 20)["rope_parameters"] | {"partial_rotary_factor": 0.75},
        tie_word_embeddings=True,
    ),
    "olmo2": llama(Olmo2Config),
    "olmo2 tied, biased": llama(Olmo2Config, kv_heads=6, attention_bias=True, tie_word_embeddings=True),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """case -> the model, the same model loaded by us, and what the first one's modules saw of TOKENS."""

    @functools.cache
    def loaded(case: str) -> tuple[torch.nn.Module, Decoder, dict[str, np.ndarray]]:
        model = tiny_model(CASES[case])
        decoder = load_model(str(save(model, tmp_path_factory.mktemp("model"))))
        # A copy, because transformers' dynamic rope remembers the longest sample it saw.
        return model, decoder, hf_activations(copy.deepcopy(model), TOKENS)

    return loaded


@pytest.mark.parametrize("case", CASES)
def test_every_site_of_every_layer_matches_transformers(case, load):
    _, decoder, theirs = load(case)
    ours = forward(decoder, TOKENS, everything(decoder))
    assert ours.keys() == theirs.keys() == {*decoder.config.site_widths, "logits"}
    for site in ours:
        assert worst_token(ours[site], theirs[site]) < 1e-5, site


def test_the_cases_cover_every_registered_family():
    assert {config.model_type for config in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_that_was_saved_without_its_head_is_read(family, load, tmp_path):
    model, whole, _ = load(next(case for case, config in CASES.items() if config.model_type == family))
    headless = load_model(str(save(model.base_model, tmp_path)), with_head=False)
    expected = dict(nnx.to_flat_state(nnx.state(whole)))
    for name, parameter in nnx.to_flat_state(nnx.state(headless)):
        np.testing.assert_array_equal(parameter[...], expected[name][...])


# What a case sets, and what the block would be without it.
MATTERS = {
    "qwen2 windows on the last layers": {"windows": (None,) * 4},
    "qwen2 windows by layer type": {"windows": (None, None, 5, 5)},
    "qwen3": {"qk_norm": None},
    "llama dynamic rope": {"rope.scaling": None},
    "llama longrope": {"rope.scaling.attention_factor": 1.0},
    "mistral window": {"windows": (None,) * 4},
    "gemma, first release": {"activation": "silu"},
    "gemma2": {"attn_softcap": None},
    "gemma2 untied, biased, no caps": {"windows": (5, None, 5, None)},
    "gemma3": {"local_rope": None},
    "gemma3 yarn, by layer type": {"query_scale": 12**-0.5},
    "gpt_neox": {"parallel": False},
    "gpt_neox odd rotation": {"rope.rotary_dim": 12},
    "gpt2 untied, scaled by layer": {"scale_by_inverse_layer": False},
    "gpt2 unscaled": {"query_scale": 8**-0.5},
    "phi3 window": {"windows": (None,) * 4},
    "phi3 partly rotated, tied": {"rope.scaling.original_max_positions": 64},
    "olmo2": {"norm": "rms_plus_one"},
}


def edited(config, path: str, value):
    name, _, rest = path.partition(".")
    return replace(config, **{name: edited(getattr(config, name), rest, value) if rest else value})


@pytest.mark.parametrize(("case", "edits"), MATTERS.items(), ids=MATTERS)
def test_what_the_parity_cases_set_matters(case, edits, load):
    _, decoder, theirs = load(case)
    ((path, value),) = edits.items()
    arrays = {".".join(map(str, name)): param[...] for name, param in nnx.to_flat_state(nnx.state(decoder))}
    other = Decoder(edited(decoder.config, path, value), arrays)
    without = forward(other, TOKENS, Capture((3,)), optimised=False)["residual"][0]
    assert worst_token(without, theirs["residual"][3]) > 1e-3


PACKED = [
    "qwen2 windows on the last layers",
    "qwen3 tied, biased, windows",
    "llama dynamic rope",
    "gemma2",
    "gemma3",
    "gpt_neox",
    "gpt2 untied, scaled by layer",
    "phi3 longrope, long",
    "phi3 partly rotated, tied",
    "olmo2",
]


@pytest.mark.parametrize("case", PACKED)
def test_packed_and_padded_rows_equal_transformers_on_each_sample_alone(case, load):
    model, decoder, _ = load(case)
    samples = [TOKENS[0, :19], TOKENS[0, 19:47], TOKENS[1, :44]]  # on both sides of 20, where some rotations change
    places = [(0, slice(0, 19)), (0, slice(19, 47)), (1, slice(0, 44)), (2, slice(0, 19)), (3, slice(0, 28))]
    tokens, segments, positions = np.full((4, LENGTH), 7), *np.zeros((2, 4, LENGTH), np.int32)
    for segment, ((row, span), sample) in enumerate(zip(places, samples + samples[:2], strict=True), start=1):
        tokens[row, span], segments[row, span], positions[row, span] = sample, segment, np.arange(len(sample))
    ours = forward(decoder, tokens, everything(decoder, logits=False), segments, positions, optimised=False)
    for sample, at in zip(samples, [(0, 3), (1, 4), (2,)], strict=True):
        alone = hf_activations(copy.deepcopy(model), sample[None])
        for row, span in (places[place] for place in at):
            for site in ours:
                assert worst_token(ours[site][:, row, span], alone[site][:, 0]) < 1e-5, (row, site)


def test_the_last_residual_is_before_the_final_norm(load):
    model, decoder, _ = load("llama")
    ours = forward(decoder, TOKENS, Capture((3,), ("residual", "final_norm")), optimised=False)
    with torch.no_grad():
        hidden_states = model(torch.asarray(TOKENS), output_hidden_states=True).hidden_states
    assert worst_token(ours["final_norm"][0], hidden_states[-1].numpy()) < 1e-5
    assert worst_token(ours["residual"][0], hidden_states[-1].numpy()) > 0.1
