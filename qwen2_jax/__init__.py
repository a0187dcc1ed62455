"""Decoder-only language models in JAX whose forward pass returns activations by name."""

from qwen2_jax.config import DecoderConfig, RopeConfig
from qwen2_jax.decoder import Decoder, parameter_specs
from qwen2_jax.errors import ModelError
from qwen2_jax.loading import load_config, load_model, load_tokenizer, model_identity, tokenizer_digest
from qwen2_jax.taps import SITES, Capture

__all__ = [
    "SITES",
    "Capture",
    "Decoder",
    "DecoderConfig",
    "ModelError",
    "RopeConfig",
    "load_config",
    "load_model",
    "load_tokenizer",
    "model_identity",
    "parameter_specs",
    "tokenizer_digest",
]
