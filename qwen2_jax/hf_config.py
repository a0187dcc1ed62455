"""Reads fields of a Hugging Face config.json, failing closed: what is not understood is refused by name.

Messages start with the field; whoever knows the file puts its name in front.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2_jax.config import LinearScaling, Llama3Scaling, RopeConfig, RopeScaling, YarnScaling
from qwen2_jax.errors import ModelError, reading

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
    with reading(path):
        if not path.is_file():
            raise ModelError(f"{folder}: no config.json; a model is a Hugging Face folder, a hub id or a .gguf file")
        content = path.read_bytes()
    try:
        fields = json.loads(content.decode())
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path}: a JSON object is needed, found {type(fields).__name__}")
    stated = fields.get("quantization_config")
    if stated is not None:
        method = stated.get("quant_method", "unknown") if isinstance(stated, dict) else stated
        raise ModelError(
            f"{path}: quantization_config: {method} weights are not supported; use the unquantised checkpoint or a GGUF"
        )
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


def number(fields: Fields, name: str) -> float:
    """A field that must be there and be a positive number that a float holds."""
    value = require(fields, name)
    # A bool is an int to Python; a long enough int overflows, and so is compared before it is converted.
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise ModelError(f"{name} must be a positive number, found {value!r:.40}")
    return float(value)


def flag(fields: Fields, name: str, default: bool = False) -> bool:
    """A field that must be true or false; `default` where it is absent or null."""
    value = fields.get(name)
    if value is not None and type(value) is not bool:
        raise ModelError(f"{name} must be true or false, found {value!r}")
    return default if value is None else value


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
    if not isinstance(value, str) or value not in allowed:
        raise ModelError(f"{name} {value!r} is not supported; supported are {', '.join(allowed)}")
    return value


def read_rope(fields: Fields) -> RopeConfig:
    """Rotary settings in either spelling: `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4)."""
    new, old = _object(fields, "rope_parameters"), _object(fields, "rope_scaling")
    if new and old and new != old:
        raise ModelError("rope_parameters and rope_scaling disagree; keep the one that is right")
    stated = dict(new or old)
    thetas = {number(place, "rope_theta") for place in (stated, fields) if place.get("rope_theta") is not None}
    if not thetas:
        raise ModelError("rope_theta is missing; add it (10000.0 for the first Llama models)")
    if len(thetas) > 1:
        raise ModelError(f"two values of rope_theta, {sorted(thetas)}; keep the one that is right")
    stated.pop("rope_theta", None)
    return RopeConfig(thetas.pop(), _read_scaling(stated, fields))


def _object(fields: Fields, name: str) -> dict[str, Any]:
    """A field that holds fields of its own; empty where it is absent or null."""
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise ModelError(f"{name} must be a JSON object, found {value!r}")
    return value or {}


def _rope_kind(stated: dict[str, Any]) -> str:
    names = [name for name in ("rope_type", "type") if stated.get(name) is not None]
    kinds = {choice(stated, name, _ROPE_KEYS) for name in names} or {"default"}
    if len(kinds) > 1:
        raise ModelError(f"rope_type and type disagree, {' and '.join(sorted(kinds))}; keep the one that is right")
    return kinds.pop()


def _read_scaling(stated: dict[str, Any], fields: Fields) -> RopeScaling | None:
    kind = _rope_kind(stated)
    stated = {name: value for name, value in stated.items() if name not in ("rope_type", "type")}
    if stated.get("partial_rotary_factor", fields.get("partial_rotary_factor")) in (None, 1, 1.0):
        stated.pop("partial_rotary_factor", None)
    if unknown := sorted(set(stated) - _ROPE_KEYS[kind]):
        raise ModelError(f"{unknown[0]} is not supported with rope type {kind!r}")
    if kind == "default":
        return None
    factor = number(stated, "factor")
    if kind == "linear":
        return LinearScaling(factor)
    original = _original_positions(stated, fields)
    if kind == "llama3":
        return Llama3Scaling(factor, number(stated, "low_freq_factor"), number(stated, "high_freq_factor"), original)
    return YarnScaling(
        factor,
        original,
        attention_factor=_yarn_attention_factor(stated, factor),
        beta_fast=number(stated, "beta_fast") if stated.get("beta_fast") else 32.0,
        beta_slow=number(stated, "beta_slow") if stated.get("beta_slow") else 1.0,
        truncate=flag(stated, "truncate", default=True),
    )


def _original_positions(stated: Fields, fields: Fields) -> int:
    """transformers' order: beside the rope settings, inside them, and then the model's own maximum."""
    name = "original_max_position_embeddings"
    for place in (fields, stated):
        if place.get(name) is not None:
            return count(place, name)
    return count(fields, "max_position_embeddings")


def _yarn_attention_factor(stated: Fields, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if stated.get("attention_factor") is not None:
        return number(stated, "attention_factor")
    if stated.get("mscale") and stated.get("mscale_all_dim"):
        return mscale(number(stated, "mscale")) / mscale(number(stated, "mscale_all_dim"))
    return mscale(1.0)
