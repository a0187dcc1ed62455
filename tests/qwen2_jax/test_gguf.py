"""GGUF: small files written here, and the real SmolLM2 against transformers' own reading of it."""

import gguf
import numpy as np
import pytest
import torch
from gguf_writing import finish, write_model
from hf_reference import SIZES, everything, forward, hf_activations, tiny_model, worst_token
from transformers import LlamaConfig, Qwen2Config

from qwen2_jax import SITES, Capture, ModelError, load_config, load_model, load_tokenizer, model_identity

TOKENS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], (1, 30))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPE = SIZES | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
MODELS = {
    "qwen2 tied": Qwen2Config(**SHAPE, rope_parameters=PLAIN, tie_word_embeddings=True),
    "qwen2 untied": Qwen2Config(**SHAPE, rope_parameters=PLAIN),
    "llama": LlamaConfig(**SHAPE, rope_parameters=PLAIN),
    "llama biases, head_dim apart": LlamaConfig(
        **SHAPE, rope_parameters=PLAIN, attention_bias=True, mlp_bias=True, head_dim=12
    ),
    "llama3 rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True),
}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_written_gguf_computes_what_its_model_did(config, tmp_path):
    model = tiny_model(config)
    write_model(model, tmp_path / "m.gguf")
    decoder = load_model(str(tmp_path))
    theirs, ours = hf_activations(model, TOKENS), forward(decoder, TOKENS, everything(decoder))
    for site in ours:
        assert worst_token(ours[site], theirs[site]) < 1e-5, site


QUANTISATIONS = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_a_quantised_gguf_is_the_model_with_its_weights_rounded(kind, tmp_path):
    model, quantisation = tiny_model(MODELS["llama"]), gguf.GGMLQuantizationType[kind]
    write_model(model, tmp_path / "m.gguf", quantisation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                # Rounding works along rows, so that permuting them before or after makes no difference.
                rounded = gguf.dequantize(gguf.quantize(parameter.numpy(), quantisation), quantisation)
                parameter.copy_(torch.tensor(rounded))
    decoder = load_model(str(tmp_path / "m.gguf"), n_layers=2)
    ours = forward(decoder, TOKENS, Capture((1,)))["residual"]
    assert worst_token(ours, hf_activations(model, TOKENS)["residual"][1:2]) < 1e-5


def small_file(path, arch="llama", **metadata):
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        writer.add_key_value(f"{arch}.{key}", value, gguf.GGUFValueType.get_type(value))
    writer.add_tensor("token_embd.weight", np.zeros((7, 8), np.float32))
    finish(writer)


COMPLETE = {
    "embedding_length": 8,
    "feed_forward_length": 8,
    "block_count": 1,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "context_length": 16,
    "rope.freq_base": 1e4,
}
REFUSED = {
    "GGUF architecture 'gemma2' is not supported": {"arch": "gemma2"},
    "llama.expert_count = 8 is not supported": COMPLETE | {"expert_count": 8},
    "llama.rope.scaling.yarn_beta_fast = 8.0 is not": COMPLETE | {"rope.scaling.yarn_beta_fast": 8.0},
    "rope_type 'longrope' is not supported": COMPLETE | {"rope.scaling.type": "longrope"},
    "rope.dimension_count 2 is not the head size 4": COMPLETE | {"rope.dimension_count": 2},
    "rope_theta is missing": {k: v for k, v in COMPLETE.items() if k != "rope.freq_base"},
}


@pytest.mark.parametrize(("message", "metadata"), REFUSED.items(), ids=REFUSED)
def test_metadata_that_is_not_understood_is_refused(message, metadata, tmp_path):
    path = tmp_path / "m.gguf"
    small_file(path, **metadata)
    with pytest.raises(ModelError) as refusal:
        load_config(str(path))
    assert message in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_missing_tensors_are_named(tmp_path):
    small_file(tmp_path / "m.gguf", **COMPLETE)
    with pytest.raises(ModelError, match=r"lacks blk\.0\.attn_k\.weight, .* and 6 more"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 3, 40, 600, -7])
def test_a_truncated_gguf_is_one_line(keep, tmp_path):
    path = tmp_path / "m.gguf"
    small_file(path, **COMPLETE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="not a whole GGUF file") as refusal:
        load_model(str(path))
    assert "\n" not in str(refusal.value)


def test_two_gguf_files_in_a_folder_are_ambiguous(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        small_file(tmp_path / name, **COMPLETE)
    with pytest.raises(ModelError, match=r"2 \.gguf files, a\.gguf first; name the one to use"):
        load_config(str(tmp_path))


PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "### Input\n```grid shape: 3x3\n1 007\n2 070\n3 700\n```\n\n### Output\n```grid shape: 3x3\n1",
    " ".join(f"{i} times {i} is {i * i}." for i in range(2, 20)) + " 20 times 20 is",
]


def test_smollm2_matches_transformers_on_real_prompts(smollm2, transformers_smollm2):
    decoder, tokenizer = load_model(str(smollm2)), load_tokenizer(str(smollm2))
    prompts = [np.array(tokenizer.encode(prompt)) for prompt in PROMPTS]
    length = max(map(len, prompts))
    tokens = np.stack([np.pad(prompt, (0, length - len(prompt))) for prompt in prompts])
    in_prompt = np.arange(length) < np.array([[len(prompt)] for prompt in prompts])
    ours = forward(decoder, tokens, everything(decoder), in_prompt.astype(int))
    for row, prompt in enumerate(prompts):
        theirs = hf_activations(transformers_smollm2, prompt[None])
        for site in SITES:
            assert worst_token(ours[site][:, row, : len(prompt)], theirs[site][:, 0]) < 1e-4, (row, site)
        next_token = ours["logits"][row, len(prompt) - 1].argmax()
        assert next_token == theirs["logits"][0, -1].argmax()
    assert tokenizer.decode([ours["logits"][0, len(prompts[0]) - 1].argmax()]) == " Paris"


def test_smollm2_is_itself_wherever_it_lies(smollm2, tmp_path):
    link = tmp_path / smollm2.name
    link.symlink_to(smollm2)
    assert model_identity(str(smollm2)) == model_identity(str(smollm2.parent)) == model_identity(str(link))
