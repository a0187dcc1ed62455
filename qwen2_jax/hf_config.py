"""Reads fields of a Hugging Face config.json, failing closed: what is not understood is refused by name.

Messages start with the field; whoever knows the file puts its name in front.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2_jax.config import LinearScaling, Llama3Scaling, RopeConfig, RopeScaling, YarnScaling
from qwen2_jax.errors import ModelError

Fields = Mapping[str, Any]

_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


def read_config_json(folder: Path) -> dict[str, Any]:
    """The fields of `folder/config.json`. Raises `ModelError` when it is missing or is not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json; a model is a Hugging Face folder, a hub id or a .gguf file")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path}: a JSON object is needed, found {type(fields).__name__}")
    if fields.get("quantization_config"):
        method = fields["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"{path}: {method} weights are not supported; use the unquantised checkpoint or a GGUF")
    return fields


def require(fields: Fields, name: str) -> Any:
    """The value of a field that must be there and not null."""
    if fields.get(name) is None:
        raise ModelError(f"{name} is missing; add it as the model's authors state it")
    return fields[name]


def count(fields: Fields, name: str) -> int:
    """A field that must be there and be a positive integer."""
    value = require(fields, name)
    if type(value) is not int or value < 1:
        raise ModelError(f"{name} must be a positive integer, found {value!r}")
    return value


def head_dim(fields: Fields) -> int:
    """`head_dim` when stated, else hidden_size / num_attention_heads, which must then divide."""
    if fields.get("head_dim") is not None:
        return count(fields, "head_dim")
    width, heads = count(fields, "hidden_size"), count(fields, "num_attention_heads")
    if width % heads:
        raise ModelError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    return width // heads


def choice(fields: Fields, name: str, allowed: Mapping[str, Any]) -> str:
    """A field whose value must be one of the names we implement."""
    value = require(fields, name)
    if value not in allowed:
        raise ModelError(f"{name} {value!r} is not supported; supported are {', '.join(allowed)}")
    return value


def read_rope(fields: Fields) -> RopeConfig:
    """Rotary settings in either spelling: `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4)."""
    new, old = fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}
    if new and old and new != old:
        raise ModelError("rope_parameters and rope_scaling disagree; keep the one that is right")
    stated = dict(new or old)
    thetas = {t for t in (stated.pop("rope_theta", None), fields.get("rope_theta")) if t is not None}
    if not thetas:
        raise ModelError("rope_theta is missing; add it (10000.0 for the first Llama models)")
    if len(thetas) > 1:
        raise ModelError(f"two values of rope_theta, {sorted(thetas)}; keep the one that is right")
    return RopeConfig(float(thetas.pop()), _read_scaling(stated, fields))


def _read_scaling(stated: dict[str, Any], fields: Fields) -> RopeScaling | None:
    kinds = {k for k in (stated.pop("rope_type", None), stated.pop("type", None)) if k is not None} or {"default"}
    kind = kinds.pop()
    if kinds or kind not in _ROPE_KEYS:
        raise ModelError(f"rope type {kind!r} is not supported; supported are {', '.join(_ROPE_KEYS)}")
    if stated.get("partial_rotary_factor", fields.get("partial_rotary_factor")) in (None, 1, 1.0):
        stated.pop("partial_rotary_factor", None)
    if unknown := sorted(set(stated) - _ROPE_KEYS[kind]):
        raise ModelError(f"{unknown[0]} is not supported with rope type {kind!r}")
    if kind == "default":
        return None
    factor = float(require(stated, "factor"))
    if kind == "linear":
        return LinearScaling(factor)
    original = _original_positions(stated, fields)
    if kind == "llama3":
        low, high = require(stated, "low_freq_factor"), require(stated, "high_freq_factor")
        return Llama3Scaling(factor, float(low), float(high), original)
    return YarnScaling(
        factor,
        original,
        attention_factor=_yarn_attention_factor(stated, factor),
        beta_fast=float(stated.get("beta_fast") or 32),
        beta_slow=float(stated.get("beta_slow") or 1),
        truncate=bool(stated.get("truncate", True)),
    )


def _original_positions(stated: Fields, fields: Fields) -> int:
    """transformers' order: beside the rope settings, inside them, and then the model's own maximum."""
    candidates = (fields.get("original_max_position_embeddings"), stated.get("original_max_position_embeddings"))
    return next((int(c) for c in candidates if c is not None), None) or require(fields, "max_position_embeddings")


def _yarn_attention_factor(stated: Fields, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if stated.get("attention_factor") is not None:
        return float(stated["attention_factor"])
    if stated.get("mscale") and stated.get("mscale_all_dim"):
        return mscale(stated["mscale"]) / mscale(stated["mscale_all_dim"])
    return mscale(1.0)
