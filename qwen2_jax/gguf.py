"""GGUF files: config from the metadata, and tensors dequantised to float32 in transformers' layout.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp's converter reorders the rows of q and k
for the architecture `llama` (its rotary pairs neighbours, not halves); reading undoes that. It leaves `qwen2` alone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize

from qwen2_jax.config import DecoderConfig, FrequencyDivisors
from qwen2_jax.errors import ModelError, reading
from qwen2_jax.families import decoder_config

ARCHITECTURES = ("llama", "qwen2")
ROPE_DIVISORS = "rope_freqs.weight"
BLOCK = "blk.{layer}."
WEIGHTS = {
    "token_embd.weight": "embedding",
    BLOCK + "attn_norm.weight": "layers.attn_norm",
    BLOCK + "attn_q.weight": "layers.q",
    BLOCK + "attn_q.bias": "layers.q_bias",
    BLOCK + "attn_k.weight": "layers.k",
    BLOCK + "attn_k.bias": "layers.k_bias",
    BLOCK + "attn_v.weight": "layers.v",
    BLOCK + "attn_v.bias": "layers.v_bias",
    BLOCK + "attn_output.weight": "layers.o",
    BLOCK + "attn_output.bias": "layers.o_bias",
    BLOCK + "ffn_norm.weight": "layers.mlp_norm",
    BLOCK + "ffn_gate.weight": "layers.gate",
    BLOCK + "ffn_gate.bias": "layers.gate_bias",
    BLOCK + "ffn_up.weight": "layers.up",
    BLOCK + "ffn_up.bias": "layers.up_bias",
    BLOCK + "ffn_down.weight": "layers.down",
    BLOCK + "ffn_down.bias": "layers.down_bias",
    "output_norm.weight": "final_norm",
    "output.weight": "lm_head",
}
# What the config fields of config.json are called in the metadata, behind the name of the architecture.
FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
}
SCALING_FIELDS = {
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
}
HARMLESS_SCALING = (*SCALING_FIELDS.values(), "rope.scaling.finetuned")
REFUSED = ("expert_count", "attention.sliding_window", "rope.scale_linear")


class GgufFile:
    """One GGUF file, parsed once; tensors are dequantised as they are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with reading(path):
                reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise ModelError(f"{path}: not a whole GGUF file ({error}); download it again") from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = self.metadata("general.architecture")

    def metadata(self, key: str, default: Any = None) -> Any:
        """A metadata value as Python data, or the default where the file does not state it."""
        return self._fields[key].contents() if key in self._fields else default

    @property
    def config(self) -> DecoderConfig:
        """Raises `ModelError` naming the metadata that is missing or not supported."""
        if self.architecture not in ARCHITECTURES:
            supported = ", ".join(ARCHITECTURES)
            raise ModelError(f"{self.path}: GGUF architecture {self.architecture!r} is not supported, only {supported}")
        try:
            config = decoder_config(self._config_fields())
        except ModelError as error:
            raise ModelError(f"{self.path}: {error}") from error
        rotary = self.metadata(f"{self.architecture}.rope.dimension_count", config.head_dim)
        if rotary != config.head_dim:
            raise ModelError(f"{self.path}: rope.dimension_count {rotary} is not the head size {config.head_dim}")
        if ROPE_DIVISORS in self._tensors:
            divisors = FrequencyDivisors(tuple(self._dequantised(ROPE_DIVISORS).tolist()))
            config = dataclasses.replace(config, rope=dataclasses.replace(config.rope, scaling=divisors))
        return config

    def _config_fields(self) -> dict[str, Any]:
        arch = self.architecture
        scaling = {key for key in self._fields if key.startswith(f"{arch}.rope.scaling.")}
        refused = {f"{arch}.{key}" for key in REFUSED} | scaling - {f"{arch}.{key}" for key in HARMLESS_SCALING}
        for key in sorted(refused):
            if self.metadata(key):
                raise ModelError(f"metadata {key} = {self.metadata(key)!r} is not supported")
        fields = {name: self.metadata(f"{arch}.{key}") for name, key in FIELDS.items()}
        rope = {name: self.metadata(f"{arch}.{key}") for name, key in SCALING_FIELDS.items()}
        if rope["rope_type"] not in (None, "none"):
            fields["rope_scaling"] = {name: value for name, value in rope.items() if value is not None}
        return fields | {
            "model_type": arch,
            "vocab_size": self.shape("token_embd.weight")[0],
            "hidden_act": "silu",
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in self._tensors,
            "tie_word_embeddings": "output.weight" not in self._tensors,
        }

    def names(self) -> Collection[str]:
        """Every tensor but the rotary divisors, which are part of the config."""
        return self._tensors.keys() - {ROPE_DIVISORS}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as numpy counts it, (out, in). Raises `ModelError` when the file has no such tensor."""
        if name not in self._tensors:
            raise ModelError(f"{self.path}: tensor {name} is missing")
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32, q and k rows in half-split order. Raises `ModelError` for an unknown quantisation."""
        array = self._dequantised(name)
        heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}.get(name.split(".")[-2])
        if self.architecture != "llama" or heads is None:
            return array
        n_heads = self.metadata(f"llama.{heads}", self.metadata("llama.attention.head_count"))
        return array.reshape(n_heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)

    def _dequantised(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            return dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise ModelError(
                f"{self.path}: {name} is quantised as {kind}, which cannot be read; use Q8_0 or F16"
            ) from error


def open_gguf(path: Path) -> GgufFile:
    """The parsed file; parsing takes about a second, so config, weights and tokenizer share one."""
    stat = os.stat(path)
    return _open_gguf(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2)
def _open_gguf(path: Path, size: int, mtime_ns: int) -> GgufFile:
    return GgufFile(path)
