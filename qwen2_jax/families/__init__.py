"""The registry of model families, by the `model_type` of config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from core.base.errors import ModelError
from qwen2_jax.config import DecoderConfig
from qwen2_jax.families.gemma import gemma_config, gemma_weights
from qwen2_jax.families.gemma2 import gemma2_config, gemma2_weights
from qwen2_jax.families.gemma3 import MULTIMODAL_PREFIXES, VISION, gemma3_config, gemma3_text_config, gemma3_weights
from qwen2_jax.families.gpt2 import gpt2_config, gpt2_weights
from qwen2_jax.families.gpt_neox import NEOX_PREFIXES, gpt_neox_config, gpt_neox_weights
from qwen2_jax.families.llama import llama_config, llama_weights
from qwen2_jax.families.mistral import mistral_config
from qwen2_jax.families.olmo2 import olmo2_config, olmo2_weights
from qwen2_jax.families.phi3 import phi3_config, phi3_weights
from qwen2_jax.families.qwen2 import qwen2_config
from qwen2_jax.families.qwen3 import qwen3_config, qwen3_weights
from qwen2_jax.mapping.hf_config import Fields, choice, read_all
from qwen2_jax.mapping.weight_table import WeightTable

# Buffers that old versions of transformers saved; they follow from the config.
ROTARY = r"rotary_emb\.inv_freq$"
MASK = r"\.(attn|attention)\.(bias|masked_bias)$"


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` are read.

    config: config.json fields -> DecoderConfig. weights: that config -> where each parameter is.
    base: the prefix that tensors lack in a checkpoint saved without its head.
    prefixes: prefix in the checkpoint -> the one that `weights` says instead.
    ignored: regular expressions (`re.search`) of tensors that have no part in the text decoder.
    """

    config: Callable[[Fields], DecoderConfig]
    weights: Callable[[DecoderConfig], WeightTable]
    base: str = "model."
    prefixes: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = (ROTARY,)


FAMILIES = {
    "gemma": Family(gemma_config, gemma_weights),
    "gemma2": Family(gemma2_config, gemma2_weights),
    "gemma3": Family(gemma3_config, gemma3_weights, prefixes=MULTIMODAL_PREFIXES, ignored=VISION),
    "gemma3_text": Family(gemma3_text_config, gemma3_weights),
    "gpt2": Family(gpt2_config, gpt2_weights, base="transformer.", ignored=(MASK,)),
    "gpt_neox": Family(
        gpt_neox_config, gpt_neox_weights, base="gpt_neox.", prefixes=NEOX_PREFIXES, ignored=(ROTARY, MASK)
    ),
    "llama": Family(llama_config, llama_weights),
    "mistral": Family(mistral_config, llama_weights),
    "olmo2": Family(olmo2_config, olmo2_weights),
    "phi3": Family(phi3_config, phi3_weights),
    "qwen2": Family(qwen2_config, llama_weights),
    "qwen3": Family(qwen3_config, qwen3_weights),
}


def decoder_config(fields: Fields) -> DecoderConfig:
    """The config of any registered family. Raises `ModelError` naming what is unsupported or inconsistent."""
    family = FAMILIES[choice(fields, "model_type", FAMILIES)]
    try:
        config = read_all(family.config, fields)
    except (TypeError, ValueError, AttributeError) as error:  # of a field that the family uses unchecked
        raise ModelError(f"a field has a value of the wrong kind ({error})") from error
    if config.n_heads % config.n_kv_heads:
        raise ModelError(
            f"num_attention_heads {config.n_heads} is not a multiple of num_key_value_heads {config.n_kv_heads}"
        )
    return config
