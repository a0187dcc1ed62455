"""GGUF: small files written here, and the real SmolLM2 against transformers' own reading of it."""

import gguf
import numpy as np
import pytest
import torch
from gguf_writing import finish, write_model
from hf_reference import SIZES, everything, forward, hf_activations, tiny_model, worst_token
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from core.base.errors import ModelError
from qwen2_jax import load_config, load_model, model_identity
from qwen2_jax.checkpoints.files import LocalFile
from qwen2_jax.checkpoints.gguf_file import GgufContainer

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
BASE_1E4 = {"rope_type": "default", "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
SLIDING = ["sliding_attention", "full_attention"] * 2
MODELS = {
    "qwen2 tied": Qwen2Config(**SHAPE, rope_parameters=PLAIN, tie_word_embeddings=True),
    "qwen2 untied": Qwen2Config(**SHAPE, rope_parameters=PLAIN),
    "qwen2 yarn": Qwen2Config(
        **SHAPE, rope_parameters=PLAIN | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    ),
    "llama": LlamaConfig(**SHAPE, rope_parameters=PLAIN),
    "llama biases, head_dim apart": LlamaConfig(
        **SHAPE, rope_parameters=PLAIN, attention_bias=True, mlp_bias=True, head_dim=12
    ),
    "llama3 rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, rope_parameters=PLAIN, head_dim=16),
    "olmo2": Olmo2Config(**SHAPE, rope_parameters=PLAIN),
    "gemma": GemmaConfig(**SHAPE, rope_parameters=BASE_1E4, head_dim=16),
    "gemma2": Gemma2Config(
        **SHAPE, rope_parameters=BASE_1E4, head_dim=16, query_pre_attn_scalar=16, sliding_window=5, layer_types=SLIDING
    ),
    "gemma3": Gemma3TextConfig(
        **SHAPE | {"num_hidden_layers": 7},
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=5,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": BASE_1E4,
        },
    ),
    "phi3": Phi3Config(**SHAPE, rope_parameters=BASE_1E4, pad_token_id=0, sliding_window=6),
    "phi3 longrope, part of the head": Phi3Config(
        **SHAPE | {"num_attention_heads": 4},
        rope_parameters=LONGROPE | {"partial_rotary_factor": 0.5},
        original_max_position_embeddings=20,
        pad_token_id=0,
    ),
    "gpt2": GPT2Config(vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=64),
    "gpt_neox parallel": GPTNeoXConfig(**SIZES, hidden_size=64, num_attention_heads=4),
    "gpt_neox sequential": GPTNeoXConfig(
        **SIZES, hidden_size=64, num_attention_heads=4, use_parallel_residual=False, tie_word_embeddings=True
    ),
}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_written_gguf_computes_what_its_model_did(config, tmp_path):
    model = tiny_model(config)
    write_model(model, tmp_path / "m.gguf")
    decoder = load_model(str(tmp_path))
    theirs, ours = hf_activations(model, TOKENS), forward(decoder, TOKENS, everything(decoder))
    assert decoder.config.family == config.model_type
    for site in ours:
        assert worst_token(ours[site], theirs[site]) < 1e-5, site


READ_BY_TRANSFORMERS = ["qwen2 tied", "llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"]


@pytest.mark.parametrize("kind", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_written_files_as_what_they_were_written_from(kind, tmp_path):
    """The writer of these tests is of our own making; this says that its files are what others take them for."""
    model = tiny_model(MODELS[kind])
    write_model(model, tmp_path / "m.gguf")
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    again = AutoModelForCausalLM.from_config(config)
    read = load_gguf_checkpoint(str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=again)["tensors"]
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            torch.testing.assert_close(read[name], tensor, atol=1e-6, rtol=0)


QUANTISED_HERE = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def quantised(kind):
    """What the package quantises to."""
    return lambda _, array: (gguf.quantize(array, kind), kind)


SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where a block has them


def random_blocks(kind):
    """Blocks of random bytes, scaled to weights of a usual size: for what the package cannot quantise."""

    def scaled(blocks, scale):
        for offset in SCALES[kind.name]:
            blocks[:, offset : offset + 2] = scale.astype(np.float16).view(np.uint8)
        return blocks

    def make(name, array):
        rng = np.random.default_rng(list(name.encode()))
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (array.size // per_block, block_bytes), np.uint8)
        ones = np.ones((len(blocks), 1))
        size = gguf.dequantize(scaled(blocks, ones), kind).std()
        return scaled(blocks, rng.uniform(0.05, 0.15, ones.shape) / size).reshape(array.shape[0], -1), kind

    return make


WIDE = LlamaConfig(
    **SHAPE | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}, rope_parameters=PLAIN
)


@pytest.mark.parametrize("kind", [*QUANTISED_HERE, *K_QUANTS])
def test_a_quantised_gguf_is_the_model_with_its_weights_rounded(kind, tmp_path):
    quantisation = gguf.GGMLQuantizationType[kind]
    model = tiny_model(WIDE)
    write_model(model, tmp_path / "m.gguf", (random_blocks if kind in K_QUANTS else quantised)(quantisation))
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors} == {kind, "F32"}
    found = load_gguf_checkpoint(str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(found)
    decoder = load_model(str(tmp_path / "m.gguf"))
    ours, theirs = forward(decoder, TOKENS, everything(decoder)), hf_activations(model, TOKENS)
    for site in ("residual", "q", "k", "logits"):
        assert worst_token(ours[site], theirs[site]) < 1e-5, site


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
    "GGUF architecture 'mamba' is not supported, only llama, ": {"arch": "mamba"},
    "llama.expert_count = 8 is not supported": COMPLETE | {"expert_count": 8},
    "llama.rope.scaling.yarn_beta_fast = 8.0 is not": COMPLETE | {"rope.scaling.yarn_beta_fast": 8.0},
    "short_factor is missing": COMPLETE | {"rope.scaling.type": "longrope"},
    "rope.dimension_count 2 is not supported": COMPLETE | {"rope.dimension_count": 2},
    "attention.value_length 8 is not supported": COMPLETE | {"attention.value_length": 8},
    "llama.attention.sliding_window = 4096 is not supported": COMPLETE | {"attention.sliding_window": 4096},
    "llama.attention.scale = 0.5 is not supported": COMPLETE | {"attention.scale": 0.5},
    "lack or misstate a size ('hidden_size')": {"arch": "phi3", "attention.head_count": 2},
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


def test_smollm2_is_itself_wherever_it_lies(smollm2, tmp_path):
    link = tmp_path / smollm2.name
    link.symlink_to(smollm2)
    assert model_identity(str(smollm2)) == model_identity(str(smollm2.parent)) == model_identity(str(link))


GEMMA = COMPLETE | {"attention.key_length": 4, "block_count": 12, "attention.head_count": 4}
SCALES_OF_QUERIES = {
    "gemma2": ({}, 4**-0.5),
    "gemma2 27B": ({"block_count": 46}, 2**-0.5),
    "gemma3": ({}, 4**-0.5),
    "gemma3 27B": ({"block_count": 62}, 2**-0.5),
}


@pytest.mark.parametrize(("kind", "edits", "scale"), [(k, *v) for k, v in SCALES_OF_QUERIES.items()])
def test_gemma_scales_queries_as_llama_cpp_does(kind, edits, scale, tmp_path):
    """src/models/gemma2.cpp and gemma3.cpp: the 27B models by model width over heads, here 8 / 4."""
    small_file(tmp_path / "m.gguf", kind.split()[0], **GEMMA | edits)
    assert load_config(str(tmp_path)).query_scale == scale


WINDOWS = {
    "gemma2": ({"attention.sliding_window": 7}, [7, None] * 6),
    "gemma2, which says nothing": ({}, [4096, None] * 6),
    "gemma3": ({"attention.sliding_window": 7}, ([7] * 5 + [None]) * 2),
    "gemma3 of another pattern": (
        {"attention.sliding_window": 7, "attention.sliding_window_pattern": 3},
        [7, 7, None] * 4,
    ),
    "gemma3 without a window": ({}, [None] * 12),
    "gemma3 with a window of 0": ({"attention.sliding_window": 0}, [None] * 12),
}


@pytest.mark.parametrize(("kind", "edits", "windows"), [(k, *v) for k, v in WINDOWS.items()])
def test_gemma_windows_are_those_that_llama_cpp_assumes(kind, edits, windows, tmp_path):
    small_file(tmp_path / "m.gguf", kind.replace(",", "").split()[0], **GEMMA | edits)
    assert list(load_config(str(tmp_path)).windows) == windows


def test_gpt_neox_20b_alone_has_the_tanh_gelu(tmp_path):
    sizes = {key: value for key, value in COMPLETE.items() if "rms" not in key and "kv" not in key}
    for blocks, activation in ((3, "gelu"), (44, "gelu_fast")):
        edits = {"attention.layer_norm_epsilon": 1e-5, "use_parallel_residual": True, "block_count": blocks}
        small_file(tmp_path / "m.gguf", "gptneox", **sizes | edits)
        assert load_config(str(tmp_path)).activation == activation


def test_one_part_of_several_says_how_to_join_them(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", np.zeros((7, 8), np.float32))
    finish(writer)
    with pytest.raises(ModelError, match=r"m\.gguf: one of several parts of a model; join them with .*--merge"):
        load_config(str(tmp_path))


def test_any_value_of_the_metadata_is_the_one_that_was_written(tmp_path):
    values = {
        "a.uint8": (200, gguf.GGUFValueType.UINT8),
        "a.int64": (-(1 << 40), gguf.GGUFValueType.INT64),
        "a.float64": (1 / 3, gguf.GGUFValueType.FLOAT64),
        "a.bool": (True, gguf.GGUFValueType.BOOL),
        "a.string": ("grüße\n", gguf.GGUFValueType.STRING),
        "a.strings": (["", "x", "ẞ" * 700_000], gguf.GGUFValueType.ARRAY),
        "a.numbers": ([1, -2, 3], gguf.GGUFValueType.ARRAY),
    }
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, (value, kind) in values.items():
        writer.add_key_value(key, value, kind)
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(3, 2))
    finish(writer)
    container = GgufContainer(LocalFile.of(tmp_path / "m.gguf"))
    for key, (value, _) in values.items():
        assert container.metadata(key) == value
    assert container.metadata("a.nothing", 7) == 7
    np.testing.assert_array_equal(container.rows("t", 1, 3), [[2, 3], [4, 5]])


def test_an_old_version_and_a_big_endian_file_are_refused(tmp_path):
    small_file(tmp_path / "m.gguf", **COMPLETE)
    data = (tmp_path / "m.gguf").read_bytes()
    for version in ((1).to_bytes(4, "little"), (3).to_bytes(4, "big")):
        (tmp_path / "m.gguf").write_bytes(data[:4] + version + data[8:])
        with pytest.raises(ModelError, match=r"not a whole GGUF file \(version"):
            load_config(str(tmp_path))
