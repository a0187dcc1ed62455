"""Models in GGUF files: the config that the metadata state, and the tensors laid out as the decoder wants them.

Names and what is done to tensors are those of llama.cpp's converter (https://github.com/ggml-org/llama.cpp: conversion/
and gguf-py/gguf/tensor_mapping.py). Where the metadata leave a number unsaid, it is the one that src/models/ there
assume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from core.base.errors import ModelError
from qwen2_jax.checkpoints.files import ByteFile
from qwen2_jax.checkpoints.gguf_file import GgufContainer
from qwen2_jax.config import DecoderConfig, FrequencyDivisors
from qwen2_jax.families import Family, decoder_config
from qwen2_jax.mapping.weight_table import Rows, Stored, WeightTable, plain

ROPE_DIVISORS = "rope_freqs.weight"
LONG_DIVISORS, SHORT_DIVISORS = "rope_factors_long.weight", "rope_factors_short.weight"
_NOT_WEIGHTS = {ROPE_DIVISORS, LONG_DIVISORS, SHORT_DIVISORS}  # part of the config
_BLOCK = "blk.{layer}."
_STEMS = {
    "layers.attn_norm": _BLOCK + "attn_norm",
    "layers.attn.q": _BLOCK + "attn_q",
    "layers.attn.k": _BLOCK + "attn_k",
    "layers.attn.v": _BLOCK + "attn_v",
    "layers.attn.q_norm": _BLOCK + "attn_q_norm",
    "layers.attn.k_norm": _BLOCK + "attn_k_norm",
    "layers.attn.o": _BLOCK + "attn_output",
    "layers.attn_post_norm": _BLOCK + "post_attention_norm",
    "layers.mlp_norm": _BLOCK + "ffn_norm",
    "layers.mlp.gate": _BLOCK + "ffn_gate",
    "layers.mlp.up": _BLOCK + "ffn_up",
    "layers.mlp.down": _BLOCK + "ffn_down",
    "layers.mlp_post_norm": _BLOCK + "post_ffw_norm",
    "final_norm": "output_norm",
    "lm_head": "output",
}
WEIGHTS = (
    plain({"embedding": "token_embd.weight", "position_embedding": "position_embd.weight"})
    | plain({f"{param}.weight": f"{stem}.weight" for param, stem in _STEMS.items()})
    | plain({f"{param}.bias": f"{stem}.bias" for param, stem in _STEMS.items()})
)

_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_RMS_SIZES = _SIZES | {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_GPT2_SIZES = {
    "n_embd": "embedding_length",
    "n_inner": "feed_forward_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
_NEOX_SIZES = _SIZES | {
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "use_parallel_residual": "use_parallel_residual",
    "rope_theta": "rope.freq_base",
}
_SCALING = {
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh"}
# Keys, after the name of the architecture, that are checked or have no part in the numbers.
_KNOWN = {*_SCALING.values(), "rope.scaling.finetuned", "rope.dimension_count", "vocab_size", "attention.value_length"}
_KNOWN |= {"tensor_data_layout"}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores the models of one `general.architecture`.

    model_type: of the family whose config it is. fields: config.json field -> metadata key after the architecture's
    name. unstated: fields that hold where the file says nothing. derived: further fields, given the file and these.
    weights: config -> where each parameter is.
    norms_plus_one: the converter added 1 to the weights of norms. paired: it reordered the rows of q and k, so that
    rotary pairs are neighbours, not halves.
    """

    model_type: str
    fields: Mapping[str, str]
    unstated: Mapping[str, Any] = field(default_factory=dict)
    derived: Callable[[GgufFile, Mapping[str, Any]], dict[str, Any]] = lambda file, fields: {}
    weights: Callable[[DecoderConfig], WeightTable] = lambda config: WEIGHTS
    norms_plus_one: bool = False
    paired: bool = False
    extra: frozenset[str] = frozenset()


def _fused_qkv(config: DecoderConfig) -> dict[str, Stored]:
    """q, k and v one after the other."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    rows = {"q": Rows(0, q), "k": Rows(q, q + kv), "v": Rows(q + kv, q + 2 * kv)}
    return {
        f"layers.attn.{part}.{kind}": Stored(f"{_BLOCK}attn_qkv.{kind}", of_part)
        for part, of_part in rows.items()
        for kind in ("weight", "bias")
    }


def _qkv_weights(config: DecoderConfig) -> WeightTable:
    return WEIGHTS | _fused_qkv(config)


def _phi3_weights(config: DecoderConfig) -> WeightTable:
    gate_up, d_ff = _BLOCK + "ffn_up.weight", config.d_ff
    mlp = {
        "layers.mlp.gate.weight": Stored(gate_up, Rows(0, d_ff)),
        "layers.mlp.up.weight": Stored(gate_up, Rows(d_ff, 2 * d_ff)),
    }
    return WEIGHTS | _fused_qkv(config) | mlp


def _biases(file: GgufFile, _: Mapping[str, Any]) -> dict[str, Any]:
    tensors = file.tensors()
    return {
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }


def _gemma_scale(file: GgufFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata do not say by what queries are scaled; llama.cpp knows the 27B models by their layers."""
    is_27b = fields["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[file.architecture]
    of_head = fields["hidden_size"] // fields["num_attention_heads"] if is_27b else fields["head_dim"]
    return {"query_pre_attn_scalar": of_head}


def _rotary_fraction(file: GgufFile, fields: Mapping[str, Any]) -> float:
    head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    return file.arch_metadata("rope.dimension_count", head_dim) / head_dim


def _phi3_fields(file: GgufFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    derived = {
        "hidden_act": "silu",
        "partial_rotary_factor": _rotary_fraction(file, fields),
        "original_max_position_embeddings": file.arch_metadata("rope.scaling.original_context_length"),
    }
    if LONG_DIVISORS in file.tensors():
        derived["rope_scaling"] = {
            "type": "longrope",
            "long_factor": file.vector(LONG_DIVISORS),
            "short_factor": file.vector(SHORT_DIVISORS),
            "attention_factor": file.arch_metadata("rope.scaling.attn_factor"),
        }
    return derived


def _neox_fields(file: GgufFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    # The metadata name no activation. All published models have the exact GELU but GPT-NeoX-20B, which has 44 layers.
    activation = "gelu_fast" if fields["num_hidden_layers"] == 44 else "gelu"
    return {"hidden_act": activation, "rotary_pct": _rotary_fraction(file, fields)}


ARCHITECTURES = {
    "llama": Architecture("llama", _RMS_SIZES, derived=_biases, paired=True),
    "qwen2": Architecture("qwen2", _RMS_SIZES, derived=_biases),
    "qwen3": Architecture("qwen3", _RMS_SIZES, derived=_biases),
    "olmo2": Architecture("olmo2", _RMS_SIZES, derived=_biases),
    "gemma": Architecture("gemma", _RMS_SIZES, _GEMMA | {"rope_theta": 1e4}, norms_plus_one=True),
    "gemma2": Architecture(
        "gemma2",
        _RMS_SIZES
        | {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
            "sliding_window": "attention.sliding_window",
        },
        _GEMMA
        | {
            "rope_theta": 1e4,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        derived=_gemma_scale,
        norms_plus_one=True,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        _RMS_SIZES
        | {
            "final_logit_softcapping": "final_logit_softcapping",
            "sliding_window": "attention.sliding_window",
            "sliding_window_pattern": "attention.sliding_window_pattern",
            "rope_local_base_freq": "rope.freq_base_swa",
        },
        _GEMMA | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": None, "sliding_window_pattern": 6},
        derived=_gemma_scale,
        norms_plus_one=True,
    ),
    "phi3": Architecture(
        "phi3",
        _RMS_SIZES | {"sliding_window": "attention.sliding_window"},
        derived=_phi3_fields,
        weights=_phi3_weights,
        extra=frozenset({"rope.scaling.attn_factor"}),
    ),
    "gpt2": Architecture("gpt2", _GPT2_SIZES, {"activation_function": "gelu_new"}, weights=_qkv_weights),
    "gptneox": Architecture("gpt_neox", _NEOX_SIZES, {"rope_theta": 1e4}, derived=_neox_fields, weights=_qkv_weights),
}


class GgufFile(GgufContainer):
    """A model in a GGUF file. Satisfies `WeightSource`."""

    def __init__(self, file: ByteFile) -> None:
        super().__init__(file)
        self.url = file.url
        self.architecture = self.metadata("general.architecture")

    def arch_metadata(self, key: str, default: Any = None) -> Any:
        """The metadata value `<architecture>.<key>`."""
        return self.metadata(f"{self.architecture}.{key}", default)

    @property
    def _described(self) -> Architecture:
        if self.architecture not in ARCHITECTURES:
            supported = ", ".join(ARCHITECTURES)
            raise ModelError(f"{self.url}: GGUF architecture {self.architecture!r} is not supported, only {supported}")
        return ARCHITECTURES[self.architecture]

    @property
    def family(self) -> Family:
        """How the file's tensors become parameters."""
        return Family(decoder_config, self._described.weights, base="")

    @property
    def config(self) -> DecoderConfig:
        """Raises `ModelError` naming the metadata that is missing or not supported."""
        described = self._described
        try:
            config = decoder_config(self._fields(described))
            expected = {"attention.value_length": config.head_dim}
            expected |= {"rope.dimension_count": config.rope.rotary_dim} if config.rope else {}
            for key, size in expected.items():
                if (found := self.arch_metadata(key, size)) != size:
                    raise ModelError(f"{key} {found} is not supported; heads have {config.head_dim} dimensions")
        except ModelError as error:
            raise ModelError(f"{self.url}: {error}") from error
        if ROPE_DIVISORS in self.tensors():
            assert config.rope is not None
            divisors = FrequencyDivisors(tuple(self.vector(ROPE_DIVISORS)))
            config = dataclasses.replace(config, rope=dataclasses.replace(config.rope, scaling=divisors))
        return config

    def _fields(self, described: Architecture) -> dict[str, Any]:
        """What config.json would say."""
        self._refuse_unknown(described)
        stated = {name: self.arch_metadata(key) for name, key in described.fields.items()}
        stated["sliding_window"] = stated.get("sliding_window") or None  # 0 says that there is none
        fields = dict(described.unstated) | {name: value for name, value in stated.items() if value is not None}
        fields |= {
            "model_type": described.model_type,
            "vocab_size": self.shape("token_embd.weight")[0],
            "tie_word_embeddings": "output.weight" not in self.tensors(),
        }
        if self.arch_metadata("rope.scaling.type") not in (None, "none"):
            scaling = {name: self.arch_metadata(key) for name, key in _SCALING.items()}
            fields["rope_scaling"] = {name: value for name, value in scaling.items() if value is not None}
        try:
            return fields | described.derived(self, fields)
        except (KeyError, TypeError, ZeroDivisionError) as error:  # of sizes that are not stated, or wrong
            raise ModelError(f"the metadata lack or misstate a size ({error})") from error

    def _refuse_unknown(self, described: Architecture) -> None:
        prefix = f"{self.architecture}."
        known = {prefix + key for key in {*described.fields.values(), *_KNOWN, *described.extra}}
        for key in sorted(key for key in self.keys() if key.startswith(prefix)):
            if key not in known and self.metadata(key):
                raise ModelError(f"metadata {key} = {self.metadata(key)!r:.60} is not supported")
        if self.metadata("split.count", 1) > 1:
            raise ModelError("one of several parts of a model; join them with llama.cpp's `llama-gguf-split --merge`")

    def vector(self, name: str) -> list[float]:
        """The values of a tensor of one dimension."""
        return self.rows(name, 0, self.shape(name)[0]).tolist()

    def names(self) -> Collection[str]:
        """Every tensor but the rotary divisors, which are part of the config."""
        return self.tensors().keys() - _NOT_WEIGHTS

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as numpy counts it, (out, in). Raises `ModelError` when the file has no such tensor."""
        if name not in self.tensors():
            raise ModelError(f"{self.url}: tensor {name} is missing")
        return self.tensors()[name].shape

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1 as transformers has them. Raises `ModelError` for an unknown quantisation."""
        described = self._described
        if described.norms_plus_one and name.endswith("_norm.weight"):
            return self.rows(name, start, stop).astype(np.float32) - 1
        heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}.get(name.split(".")[-2])
        if not described.paired or heads is None:
            return self.rows(name, start, stop)
        n_heads = self.arch_metadata(heads, self.arch_metadata("attention.head_count"))
        size = self.shape(name)[0] // n_heads
        first, last = start // size, -(-stop // size)
        pairs = self.rows(name, first * size, last * size)
        halves = pairs.reshape(last - first, size // 2, 2, -1).swapaxes(1, 2).reshape(pairs.shape)
        return halves[start - first * size : stop - first * size]


@lru_cache(maxsize=2)
def open_gguf(file: ByteFile) -> GgufFile:
    """The parsed file; config, weights and tokenizer share one."""
    return GgufFile(file)
