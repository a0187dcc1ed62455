"""Decoder-only language models in JAX whose forward pass returns activations by name.

Names are imported at their first use: `--help` and errors need neither JAX nor Flax.
"""

import importlib
from typing import TYPE_CHECKING, Any

from core.base.errors import ModelError

if TYPE_CHECKING:
    from qwen2_jax.checkpoints.loading import load_config, load_model, load_tokenizer, model_identity, tokenizer_digest
    from qwen2_jax.config import DecoderConfig, RopeConfig
    from qwen2_jax.decoder import Decoder
    from qwen2_jax.parameters import parameter_specs
    from qwen2_jax.taps import SITES, Capture

_MODULES = {
    "SITES": "taps",
    "Capture": "taps",
    "Decoder": "decoder",
    "DecoderConfig": "config",
    "RopeConfig": "config",
    "load_config": "checkpoints.loading",
    "load_model": "checkpoints.loading",
    "load_tokenizer": "checkpoints.loading",
    "model_identity": "checkpoints.loading",
    "parameter_specs": "parameters",
    "tokenizer_digest": "checkpoints.loading",
}

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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
