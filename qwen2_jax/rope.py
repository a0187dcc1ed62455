"""Rotary position embeddings: frequencies on the host, rotation on the device.

Axes: B rows, T tokens, H head_dim, R rotary frequencies (pairs of dimensions).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qwen2_jax.config import (
    DynamicScaling,
    FrequencyDivisors,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)

Tables = tuple[Float[Array, "B T R"], Float[Array, "B T R"]]


def rotary_frequencies(rope: RopeConfig, length: int = 1) -> Float[np.ndarray, " R"]:
    """Angle per position of every rotary pair, float32, in a sample of `length` tokens.

    The order of roundings is that of transformers' `ROPE_INIT_FUNCTIONS`: one ulp here is 1e-4 rad at position 2,000.
    """
    base = _base(np.float32(rope.theta), rope.rotary_dim)
    match rope.scaling:
        case None:
            return np.float32(1) / base
        case LinearScaling(factor):
            return np.float32(1) / base / np.float32(factor)
        case FrequencyDivisors(values):
            return np.float32(1) / base / np.asarray(values, np.float32)
        case DynamicScaling():
            return np.float32(1) / _base(_dynamic_theta(rope, rope.scaling, length), rope.rotary_dim)
        case Llama3Scaling():
            return _llama3(np.float32(1) / base, rope.scaling)
        case YarnScaling():
            return _yarn(base, rope.scaling, rope.theta, rope.rotary_dim)
        case LongRopeScaling(short, long, original_max_positions):
            divisors = long if length > original_max_positions else short
            return np.float32(1) / (np.asarray(divisors, np.float32) * base)


def _base(theta: np.float32, rotary_dim: int) -> np.ndarray:
    return theta ** (np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim))


def _dynamic_theta(rope: RopeConfig, s: DynamicScaling, length: int) -> np.float32:
    theta = np.float32(rope.theta)
    if length <= s.original_max_positions:
        return theta
    stretch = np.float32(s.factor) * np.float32(length) / np.float32(s.original_max_positions) - np.float32(
        s.factor - 1
    )
    return theta * stretch ** np.float32(rope.rotary_dim / (rope.rotary_dim - 2))


def _llama3(freqs: np.ndarray, s: Llama3Scaling) -> np.ndarray:
    wavelength = np.float32(2 * math.pi) / freqs
    blend = (np.float32(s.original_max_positions) / wavelength - np.float32(s.low_freq_factor)) / np.float32(
        s.high_freq_factor - s.low_freq_factor
    )
    factor = np.float32(s.factor)
    blended = (1 - blend) * freqs / factor + blend * freqs
    is_long = wavelength > s.original_max_positions / s.low_freq_factor
    is_short = wavelength < s.original_max_positions / s.high_freq_factor
    return np.where(is_long, freqs / factor, np.where(is_short, freqs, blended)).astype(np.float32)


def _yarn(base: np.ndarray, s: YarnScaling, theta: float, rotary_dim: int) -> np.ndarray:
    def pair_turning(n_rotations: float) -> float:
        """The (fractional) rotary pair that turns n times within the original context."""
        return rotary_dim * math.log(s.original_max_positions / (n_rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(s.beta_fast), pair_turning(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # the reference's guard against dividing by zero
    ramp = (np.arange(rotary_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = 1 - np.clip(ramp, 0, 1)
    return (1 / (np.float32(s.factor) * base) * (1 - keep) + 1 / base * keep).astype(np.float32)


def rotary_tables(rope: RopeConfig, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Tables:
    """cos and sin of every token's angles, float32. Scalings that go by a sample's length go by that of its segment."""
    angles = positions[..., None].astype(jnp.float32) * _frequencies_by_token(rope, positions, segment_ids)
    scale = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling | LongRopeScaling) else 1.0
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _frequencies_by_token(
    rope: RopeConfig, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B T R"] | Float[np.ndarray, " R"]:
    """One set of frequencies for all, unless a row has room for samples that need others."""
    longest = positions.shape[1]
    match rope.scaling:
        case DynamicScaling():
            first, last = rope.scaling.original_max_positions, longest
        case LongRopeScaling():
            first, last = rope.scaling.original_max_positions, rope.scaling.original_max_positions + 1
        case _:
            return rotary_frequencies(rope)
    if longest <= first:
        return rotary_frequencies(rope)
    by_length = np.stack([rotary_frequencies(rope, length) for length in range(first, last + 1)])
    return jnp.asarray(by_length)[jnp.clip(sample_lengths(positions, segment_ids), first, last) - first]


def sample_lengths(positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens the segment of each token has."""
    length = segment_ids.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)
    ends = segment_ids != jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    last = jax.lax.cummin(jnp.where(ends, index, length), axis=1, reverse=True)
    return positions + (last - index) + 1


def rotate(x: Float[Array, "B T *heads H"], tables: Tables) -> Float[Array, "B T *heads H"]:
    """Rotate each pair (x[r], x[r + R]) of the first 2 R dimensions by its angle: in float32, rounded once."""
    heads = tuple(range(2, x.ndim - 1))
    cos, sin = (jnp.expand_dims(table, heads) for table in tables)
    n_pairs = cos.shape[-1]
    first, second = (part.astype(jnp.float32) for part in (x[..., :n_pairs], x[..., n_pairs : 2 * n_pairs]))
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*(part.astype(x.dtype) for part in rotated), x[..., 2 * n_pairs :]], axis=-1)


def rotate_q_k(
    q: Float[Array, "B T K G H"], k: Float[Array, "B T K H"], tables: Tables | None
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K H"]]:
    """Both by `rotate`, or as they are where nothing rotates."""
    return (q, k) if tables is None else (rotate(q, tables), rotate(k, tables))
