"""Reads the rotary settings of a config.json, in every spelling that transformers has written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from core.base.errors import ModelError, UnsupportedError
from qwen2_jax.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from qwen2_jax.mapping.hf_config import Fields, choice, count, flag, number, object_field, require

ORIGINAL = "original_max_position_embeddings"
ROPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", ORIGINAL},
    "yarn": {
        "factor",
        ORIGINAL,
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "longrope": {"factor", "short_factor", "long_factor", ORIGINAL, "attention_factor"},
}


def read_rope(
    fields: Fields,
    head_dim: int,
    *,
    theta: tuple[str, ...] = ("rope_theta",),
    fraction: tuple[str, ...] = (),
    defaults: Fields | None = None,
) -> RopeConfig:
    """Rotary settings in either spelling: `rope_parameters` (transformers 5), `rope_scaling` and fields beside it (4).

    theta, fraction: the names that the family's configs have beside `rope_parameters` for the base and for the part of
    each head that rotates (none: all of it does). defaults: of `rope_theta` and `partial_rotary_factor`, where neither
    has to be stated. Raises `ModelError` for what is missing, contradictory or not understood.
    """
    new, old = object_field(fields, "rope_parameters"), object_field(fields, "rope_scaling")
    if new and old and new != old:
        raise ModelError("rope_parameters and rope_scaling disagree; keep the one that is right")
    stated = {name: value for name, value in (new or old).items() if value is not None}
    defaults = defaults or {}
    base = _one_value("rope_theta", stated, fields, theta) or defaults.get("rope_theta")
    if base is None:
        raise ModelError("rope_theta is missing; add it (10000.0 for the first Llama models)")
    name = "partial_rotary_factor"
    part = _one_value(name, stated, fields, {name, *fraction}) or defaults.get(name, 1.0)
    if part > 1 or (part != 1 and not fraction):
        raise UnsupportedError(f"{name} {part} is not supported; here all of each head rotates")
    rotary_dim = int(head_dim * part)
    if rotary_dim < 1 or (part == 1 and head_dim % 2):
        raise ModelError(f"{rotary_dim} of {head_dim} dimensions of each head would rotate; they rotate in pairs")
    scaling = {key: value for key, value in stated.items() if key not in ("rope_theta", name)}
    return RopeConfig(base, rotary_dim, _read_scaling(scaling, fields, rotary_dim))


def longest_sample(rope: RopeConfig, max_position_embeddings: int) -> int:
    """How many tokens the rotary embedding reaches, which some configs state before its scaling and some after."""
    match rope.scaling:
        case DynamicScaling() | YarnScaling():
            reach = int(rope.scaling.factor * rope.scaling.original_max_positions)
            return max(reach, max_position_embeddings)
    return max_position_embeddings


def _one_value(name: str, stated: Fields, fields: Fields, names_beside: Iterable[str]) -> float | None:
    """What the rotary settings or any of the fields beside them say, which must be the same; None where none does."""
    values = {number(stated, name)} if stated.get(name) is not None else set()
    values |= {number(fields, beside) for beside in names_beside if fields.get(beside) is not None}
    if len(values) > 1:
        raise ModelError(f"two values of {name}, {sorted(values)}; keep the one that is right")
    return values.pop() if values else None


def _rope_kind(stated: dict[str, Any]) -> str:
    names = [name for name in ("rope_type", "type") if stated.get(name) is not None]
    kinds = {choice(stated, name, ROPE_KEYS) for name in names} or {"default"}
    if len(kinds) > 1:
        raise ModelError(f"rope_type and type disagree, {' and '.join(sorted(kinds))}; keep the one that is right")
    return kinds.pop()


def _read_scaling(stated: dict[str, Any], fields: Fields, rotary_dim: int) -> RopeScaling | None:
    kind = _rope_kind(stated)
    stated = {name: value for name, value in stated.items() if name not in ("rope_type", "type")}
    if unknown := sorted(set(stated) - ROPE_KEYS[kind]):
        raise UnsupportedError(f"{unknown[0]} is not supported with rope type {kind!r}")
    fields.get(ORIGINAL)  # read, though it means nothing to the kinds that do not ask for it
    match kind:
        case "linear":
            return LinearScaling(number(stated, "factor"))
        case "dynamic":
            return DynamicScaling(number(stated, "factor"), count(fields, "max_position_embeddings"))
        case "llama3":
            factor, low, high = (number(stated, name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
            return Llama3Scaling(factor, low, high, _original_positions(stated, fields))
        case "yarn":
            return _yarn(stated, fields)
        case "longrope":
            return _longrope(stated, fields, rotary_dim)
    return None


def _original_positions(stated: Fields, fields: Fields) -> int:
    """transformers' order: beside the rope settings, inside them, and then the model's own maximum."""
    for place in (fields, stated):
        if place.get(ORIGINAL) is not None:
            return count(place, ORIGINAL)
    return count(fields, "max_position_embeddings")


def _yarn(stated: Fields, fields: Fields) -> YarnScaling:
    factor = number(stated, "factor")
    return YarnScaling(
        factor,
        _original_positions(stated, fields),
        attention_factor=_yarn_attention_factor(stated, factor),
        beta_fast=number(stated, "beta_fast") if stated.get("beta_fast") else 32.0,
        beta_slow=number(stated, "beta_slow") if stated.get("beta_slow") else 1.0,
        truncate=flag(stated, "truncate", default=True),
    )


def _yarn_attention_factor(stated: Fields, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if stated.get("attention_factor") is not None:
        return number(stated, "attention_factor")
    if stated.get("mscale") and stated.get("mscale_all_dim"):
        return mscale(number(stated, "mscale")) / mscale(number(stated, "mscale_all_dim"))
    return mscale(1.0)


def _longrope(stated: Fields, fields: Fields, rotary_dim: int) -> LongRopeScaling:
    original = _original_positions(stated, fields)
    if stated.get("factor") is not None:
        factor = number(stated, "factor")
    else:
        factor = count(fields, "max_position_embeddings") / original
    if stated.get("attention_factor") is not None:
        attention_factor = number(stated, "attention_factor")
    else:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    n_pairs = (rotary_dim + 1) // 2
    short, long = (_divisors(stated, name, n_pairs) for name in ("short_factor", "long_factor"))
    return LongRopeScaling(short, long, original, attention_factor)


def _divisors(stated: Fields, name: str, n_pairs: int) -> tuple[float, ...]:
    values = require(stated, name)
    if not isinstance(values, list) or len(values) != n_pairs:
        found = f"{len(values)}" if isinstance(values, list) else repr(values)
        raise ModelError(f"{name} must be a list of {n_pairs} numbers, one for each rotary pair; found {found}")
    return tuple(number({name: value}, name) for value in values)
