"""What is made of config.json: published files, every spelling, and what is refused."""

import json

import pytest
from transformers import CONFIG_MAPPING

from core.base.errors import ModelError
from qwen2_jax import DecoderConfig, RopeConfig
from qwen2_jax.config import LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling
from qwen2_jax.families import FAMILIES, decoder_config

# As published, but for the fields that all of them have.
PUBLISHED = {
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3-8B": {
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "SmolLM2-135M": {
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "vocab_size": 49152,
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "gemma-2b": {
        "model_type": "gemma",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
    },
    "gemma-2-9b": {
        "model_type": "gemma2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "vocab_size": 256000,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "gemma-3-12b": {
        "model_type": "gemma3",
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "text_config": {
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "model_type": "gemma3_text",
            "num_attention_heads": 16,
            "num_hidden_layers": 48,
            "num_key_value_heads": 8,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "vision_use_head": False},
    },
    "pythia-12b": {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "hidden_size": 5120,
        "intermediate_size": 20480,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": 40,
        "num_hidden_layers": 36,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "vocab_size": 50688,
    },
    "gpt2": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "Phi-3-mini-4k": {
        "model_type": "phi3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "vocab_size": 32064,
    },
    "Phi-4-mini": {
        "model_type": "phi3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "full_attn_mod": 1,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
    "OLMo-2-7B": {
        "model_type": "olmo2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "vocab_size": 100352,
    },
}
ALL_HAVE = {
    "_name_or_path": "somewhere",
    "architectures": ["ForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": [1, 107],
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.2",
    "use_cache": True,
}


def published(name: str, **edits: object) -> DecoderConfig:
    return decoder_config(ALL_HAVE | PUBLISHED[name] | edits)


# What their authors' papers and code say.
LLAMA3 = Llama3Scaling(32.0, 1.0, 4.0, 8192)
EXPECTED = {
    "Qwen2.5-0.5B": {"head_dim": 64, "tie_embeddings": True, "qkv_bias": True, "o_bias": False, "qk_norm": None},
    "Qwen3-8B": {"rope": RopeConfig(1e6, 128), "qkv_bias": False, "qk_norm": "head", "query_scale": 128**-0.5},
    "Llama-3.2-1B": {"rope": RopeConfig(5e5, 64, LLAMA3), "max_positions": 131072, "tie_embeddings": True},
    "SmolLM2-135M": {"head_dim": 64, "n_kv_heads": 3, "rope": RopeConfig(1e5, 64), "activation": "silu"},
    "Mistral-7B-v0.1": {"windows": (4096,) * 32, "n_kv_heads": 8, "qkv_bias": False},
    "gemma-2b": {"activation": "gelu_pytorch_tanh", "tie_embeddings": True, "embedding_scale": 2048**0.5},
    "gemma-2-9b": {"windows": (4096, None) * 21, "attn_softcap": 50.0, "final_softcap": 30.0, "query_scale": 1 / 16},
    "gemma-3-1b": {"local_rope": RopeConfig(1e4, 256), "windows": ((512,) * 5 + (None,)) * 4 + (512, 512)},
    "gemma-3-12b": {
        "family": "gemma3",
        "vocab_size": 262208,
        "rope": RopeConfig(1e6, 256, LinearScaling(8.0)),
        "local_rope": RopeConfig(1e4, 256),
        "max_positions": 131072,
        "query_scale": 1 / 16,
        "post_norm": True,
    },
    "pythia-12b": {"parallel": True, "rope": RopeConfig(1e4, 32), "head_dim": 128, "tie_embeddings": False},
    "gpt2": {"rope": None, "learned_positions": True, "d_ff": 3072, "tie_embeddings": True, "max_positions": 1024},
    "Phi-3-mini-4k": {"windows": (2047,) * 32, "rope": RopeConfig(1e4, 96)},
    "Phi-4-mini": {
        "n_kv_heads": 8,
        "rope": RopeConfig(1e4, 96, LongRopeScaling((1.0,) * 48, (2.0,) * 48, 4096, (1 + 5 / 12) ** 0.5)),
    },
    "OLMo-2-7B": {"pre_norm": False, "post_norm": True, "norm": "rms_f32", "qk_norm": "full", "norm_eps": 1e-6},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_as_its_authors_mean_it(name):
    config = published(name)
    assert {field: getattr(config, field) for field in EXPECTED[name]} == EXPECTED[name]
    assert hash(config) == hash(published(name))


def test_there_is_a_published_config_of_every_registered_family():
    assert {fields["model_type"] for fields in PUBLISHED.values()} == set(FAMILIES)
    assert EXPECTED.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_this_version_of_transformers_writes_is_understood(family):
    config = CONFIG_MAPPING[family]()
    assert decoder_config(config.to_dict()) == decoder_config(json.loads(config.to_json_string()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_spelling_of_transformers_5_reads_as_that_of_4(name):
    config = CONFIG_MAPPING[PUBLISHED[name]["model_type"]](**ALL_HAVE | PUBLISHED[name])
    rewritten = json.loads(config.to_json_string())
    assert name == "gpt2" or "rope_parameters" in rewritten | rewritten.get("text_config", {})
    assert decoder_config(rewritten) == published(name)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("value", [True, 2, "x", [1], {"a": 1}], ids=str)
def test_a_field_that_nothing_acts_on_is_refused_by_name(name, value):
    with pytest.raises(ModelError, match=r"surprise .* is not implemented for this model type"):
        published(name, surprise=value)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}], ids=repr)
def test_a_field_that_states_nothing_is_not_refused(value):
    assert published("gemma-2b", surprise=value) == published("gemma-2b")


# Fields of transformers' own that change the numbers in some family, put into one that does not act on them.
REFUSED = {
    "attention_bias True": ("Mistral-7B-v0.1", {"attention_bias": True}),
    "sliding_window 4096": ("Llama-3.2-1B", {"sliding_window": 4096}),
    "mlp_bias True": ("Qwen3-8B", {"mlp_bias": True}),
    "attn_logit_softcapping 50.0": ("gemma-2b", {"attn_logit_softcapping": 50.0}),
    "use_bidirectional_attention True": ("gemma-3-1b", {"use_bidirectional_attention": True}),
    "layer_types": ("Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 32}),
    "clip_qkv 8.0": ("OLMo-2-7B", {"clip_qkv": 8.0}),
    "pretraining_tp 2": ("Llama-3.2-1B", {"pretraining_tp": 2}),
    "is_causal False": ("Llama-3.2-1B", {"is_causal": False}),
    "lm_head_bias True": ("Phi-4-mini", {"lm_head_bias": True}),
    "add_cross_attention True": ("gpt2", {"add_cross_attention": True}),
    "dual_chunk_attention_config": ("Qwen2.5-0.5B", {"dual_chunk_attention_config": {"chunk_size": 1}}),
    "text_config: num_experts 8": ("gemma-3-12b", {"text_config": {"num_experts": 8}}),
    "text_config is missing": ("gemma-3-12b", {"text_config": None}),
    "tie_word_embeddings differs": ("gemma-3-12b", {"tie_word_embeddings": False}),
    "model_type 'mixtral' is not supported; supported are gemma": ("Mistral-7B-v0.1", {"model_type": "mixtral"}),
    "hidden_act 'mish' is not supported; supported are silu": ("Llama-3.2-1B", {"hidden_act": "mish"}),
    "hidden_act and hidden_activation disagree": ("gemma-2b", {"hidden_activation": "silu"}),
    "sliding_window_size and sliding_window disagree": ("gemma-2-9b", {"sliding_window_size": 1}),
    "layer_types slides but sliding_window": (
        "gemma-2-9b",
        {"sliding_window": None, "sliding_window_size": None, "layer_types": ["sliding_attention"] * 42},
    ),
    "layer type 'chunked_attention' is not supported": ("gemma-2-9b", {"layer_types": ["chunked_attention"] * 42}),
    "head_dim 64 is not hidden_size / num_attention_heads": ("pythia-12b", {"head_dim": 64}),
    "n_embd 768 is not a multiple of n_head 7": ("gpt2", {"n_head": 7}),
    "num_attention_heads 32 is not a multiple of num_key_value_heads 5": ("Qwen3-8B", {"num_key_value_heads": 5}),
    "query_pre_attn_scalar is missing": ("gemma-2-9b", {"query_pre_attn_scalar": None}),
    "layer_norm_eps is missing": ("pythia-12b", {"layer_norm_eps": None}),
}


@pytest.mark.parametrize(("message", "case"), REFUSED.items(), ids=REFUSED)
def test_a_config_that_means_something_else_is_refused(message, case):
    name, edits = case
    with pytest.raises(ModelError, match=f"^{message}"):
        published(name, **edits)


# What transformers takes to be there where a config does not say: not guessed, unlike null, which says that it is not.
OPEN = {
    "Mistral-7B-v0.1": ["sliding_window"],
    "gemma-2-9b": ["sliding_window", "attn_logit_softcapping", "final_logit_softcapping"],
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in OPEN.items() for field in fields])
def test_a_window_or_cap_that_is_left_open_is_refused_and_null_is_none(name, field):
    fields = ALL_HAVE | {key: value for key, value in PUBLISHED[name].items() if key != "sliding_window_size"}
    decoder_config(fields | {field: None})
    del fields[field]
    with pytest.raises(ModelError, match=f"^{field} is missing"):
        decoder_config(fields)


def test_windows_follow_max_window_layers_unless_layer_types_say_otherwise():
    slides = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 22}
    assert published("Qwen2.5-0.5B", **slides).windows == (None,) * 22 + (9, 9)
    kinds = ["sliding_attention"] + ["full_attention"] * 23
    assert published("Qwen2.5-0.5B", **slides, layer_types=kinds).windows == (9,) + (None,) * 23
    assert published("gemma-3-1b", sliding_window_pattern=2).windows == (512, None) * 13


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ({}, RopeConfig(1e4, 32)),
        ({"rotary_pct": None, "rotary_emb_base": None}, RopeConfig(1e4, 32)),
        ({"rotary_pct": 1.0, "rotary_emb_base": 500}, RopeConfig(500.0, 128)),
        ({"rope_theta": 10000.0, "partial_rotary_factor": 0.25}, RopeConfig(1e4, 32)),
    ],
)
def test_every_spelling_of_gpt_neox_rotation(edits, expected):
    assert published("pythia-12b", **edits).rope == expected


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"rope_theta": 500.0}, "two values of rope_theta, [500.0, 10000.0]"),
        ({"partial_rotary_factor": 0.5}, "two values of partial_rotary_factor, [0.25, 0.5]"),
    ],
)
def test_two_spellings_that_disagree_are_refused(edits, message):
    with pytest.raises(ModelError) as refusal:
        published("pythia-12b", **edits)
    assert message in str(refusal.value)


def test_the_first_name_of_longrope_is_understood():
    old = PUBLISHED["Phi-4-mini"]["rope_scaling"] | {"type": "su"}
    assert published("Phi-4-mini", rope_scaling=old) == published("Phi-4-mini")


def test_gemma_3_rotation_by_layer_type_reads_as_the_flat_spelling():
    nested = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    edits = dict.fromkeys(("rope_theta", "rope_local_base_freq"), None)
    assert published("gemma-3-1b", **edits, rope_parameters=nested) == published("gemma-3-1b")
    with pytest.raises(ModelError, match="must hold full_attention and sliding_attention, found 'rope_theta'"):
        published("gemma-3-1b", **edits, rope_parameters={"rope_theta": 1e6})


def test_yarn_and_dynamic_scaling_reach_past_the_models_own_maximum():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = published("Qwen2.5-0.5B", rope_scaling=yarn)
    assert config.max_positions == 131072
    assert isinstance(config.rope.scaling, YarnScaling)
    assert published("Qwen2.5-0.5B", rope_scaling=yarn, max_position_embeddings=131072).max_positions == 131072
    dynamic = {"type": "dynamic", "factor": 2.0}
    assert published("Qwen2.5-0.5B", rope_scaling=dynamic).max_positions == 65536
