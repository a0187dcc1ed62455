"""Writes GGUF files as llama.cpp's converter does, for the tests to read back.

Names of tensors and metadata come from the package `gguf`, which llama.cpp keeps for its converter; what is done to the
tensors of each architecture follows its conversion/*.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PreTrainedConfig

Quantise = Callable[[str, np.ndarray], tuple[np.ndarray, gguf.GGMLQuantizationType]]

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "gpt_neox": gguf.MODEL_ARCH.GPTNEOX,
}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (first half, second half) to neighbouring pairs."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def as_stored(name: str, array: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """float32."""
    return array, gguf.GGMLQuantizationType.F32


def write_model(model: torch.nn.Module, path: Path, quantise: Quantise = as_stored) -> None:
    """A model of any of `ARCHITECTURES`. quantise: what becomes of each matrix."""
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    write_metadata(writer, config)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in tensors(model):
        array = np.ascontiguousarray(tensor)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        array, kind = quantise(gguf_name, array) if array.ndim == 2 else as_stored(gguf_name, array)
        writer.add_tensor(gguf_name, array, raw_dtype=kind)
    for name, values in rope_tensors(model):
        writer.add_tensor(name, values.astype(np.float32))
    finish(writer)


def write_metadata(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    """What llama.cpp's converter states for the architecture."""
    kind, rope = config.model_type, getattr(config, "rope_parameters", None) or {}
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(4 * config.hidden_size if kind == "gpt2" else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if kind in ("gpt2", "gpt_neox"):
        writer.add_layer_norm_eps(config.layer_norm_epsilon if kind == "gpt2" else config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_head_count_kv(config.num_key_value_heads)
    if kind == "gpt_neox":
        writer.add_rope_dimension_count(
            int(rope["partial_rotary_factor"] * config.hidden_size / config.num_attention_heads)
        )
        writer.add_parallel_residual(config.use_parallel_residual)
    if kind not in ("gpt2", "gpt_neox", "phi3") and getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    write_rope(writer, config, rope)
    if kind in ("gemma2", "gemma3_text", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def write_rope(writer: gguf.GGUFWriter, config: PreTrainedConfig, rope: dict) -> None:
    """Not of Gemma 1, Gemma 2 and GPT-NeoX, whose converters leave the base out."""
    kind = config.model_type
    if kind == "gemma3_text":
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    if kind in ("gemma", "gemma2", "gpt2", "gpt_neox"):
        return
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
    if kind == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        part = rope.get("partial_rotary_factor", 1.0)
        writer.add_rope_dimension_count(int(part * config.hidden_size) // config.num_attention_heads)
        if rope["rope_type"] == "longrope":
            scale = config.max_position_embeddings / config.original_max_position_embeddings
            factor = np.sqrt(1 + np.log(scale) / np.log(config.original_max_position_embeddings))
            writer.add_rope_scaling_attn_factors(float(factor))
    scalings = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
    if rope["rope_type"] in scalings:
        writer.add_rope_scaling_type(scalings[rope["rope_type"]])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def tensors(model: torch.nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters, changed as the converter changes them."""
    config = model.config
    kind, heads = config.model_type, config.num_attention_heads
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if kind in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
            array = permute(array, heads if "q_proj" in name else config.num_key_value_heads)
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if kind == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            array = array.T
        if kind == "gpt_neox" and "query_key_value" in name:
            by_head = array.reshape(heads, 3, -1, *array.shape[1:])
            array = np.concatenate([by_head[:, part].reshape(-1, *array.shape[1:]) for part in range(3)])
        yield name, array


def rope_tensors(model: torch.nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    """The rotary divisors of llama3 and longrope scaling."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        dim = model.config.head_dim
        plain = rope["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
        yield "rope_freqs.weight", plain / model.model.rotary_emb.inv_freq.double().numpy()
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", np.array(rope["long_factor"])
        yield "rope_factors_short.weight", np.array(rope["short_factor"])


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
