"""The registry of model families, by the `model_type` of config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qwen2_jax.config import DecoderConfig
from qwen2_jax.errors import ModelError
from qwen2_jax.hf_config import Fields, choice
from qwen2_jax.llama import WEIGHTS, llama_config, mistral_config
from qwen2_jax.qwen2 import qwen2_config


@dataclass(frozen=True)
class Family:
    """config: config.json fields -> DecoderConfig. weights: checkpoint name ("{layer}" in it) -> parameter name."""

    config: Callable[[Fields], DecoderConfig]
    weights: Mapping[str, str]


FAMILIES = {
    "llama": Family(llama_config, WEIGHTS),
    "mistral": Family(mistral_config, WEIGHTS),
    "qwen2": Family(qwen2_config, WEIGHTS),
}


def decoder_config(fields: Fields) -> DecoderConfig:
    """The config of any registered family. Raises `ModelError` naming what is unsupported or inconsistent."""
    family = FAMILIES[choice(fields, "model_type", FAMILIES)]
    try:
        config = family.config(fields)
    except (TypeError, ValueError, AttributeError) as error:  # of a field that the family uses unchecked
        raise ModelError(f"a field has a value of the wrong kind ({error})") from error
    if config.n_heads % config.n_kv_heads:
        raise ModelError(
            f"num_attention_heads {config.n_heads} is not a multiple of num_key_value_heads {config.n_kv_heads}"
        )
    return config
