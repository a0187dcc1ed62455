"""Writes GGUF files as llama.cpp's converter does, for the tests to read back."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

from qwen2_jax.gguf import FIELDS

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (first half, second half) to neighbouring pairs."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_model(model: torch.nn.Module, path: Path, quantised: gguf.GGMLQuantizationType | None = None) -> None:
    """A llama or qwen2 model; matrices quantised when a type is given. llama3 rope becomes rope_freqs."""
    config, arch = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    stated = config.to_dict() | {"rope_theta": config.rope_parameters["rope_theta"]}
    for name, key in FIELDS.items():
        if (value := stated.get(name)) is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{arch}.{key}", value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            array = permute(array, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        writer_name = gguf_name(name)
        if quantised is not None and array.ndim == 2:
            writer.add_tensor(writer_name, gguf.quantize(array, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(writer_name, array)
    if config.rope_parameters["rope_type"] == "llama3":
        plain = config.rope_parameters["rope_theta"] ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        scaled = model.model.rotary_emb.inv_freq.double().numpy()
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    finish(writer)


def gguf_name(name: str) -> str:
    """The llama.cpp name of a transformers parameter."""
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
