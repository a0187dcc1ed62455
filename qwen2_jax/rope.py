"""Rotary position embeddings: frequencies on the host, rotation on the device.

Axes: B rows, T tokens, H head_dim, R = H / 2 rotary frequencies.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qwen2_jax.config import FrequencyDivisors, LinearScaling, Llama3Scaling, RopeConfig, YarnScaling


def rotary_frequencies(rope: RopeConfig, head_dim: int) -> Float[np.ndarray, " R"]:
    """Angle per position of every rotary pair, float32.

    The order of roundings is that of transformers' `ROPE_INIT_FUNCTIONS`: one ulp here is 1e-4 rad at position 2,000.
    """
    base = np.float32(rope.theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    match rope.scaling:
        case None:
            return np.float32(1) / base
        case LinearScaling(factor):
            return np.float32(1) / base / np.float32(factor)
        case FrequencyDivisors(values):
            return np.float32(1) / base / np.asarray(values, np.float32)
        case Llama3Scaling():
            return _llama3(np.float32(1) / base, rope.scaling)
        case YarnScaling():
            return _yarn(base, rope.scaling, rope.theta, head_dim)


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


def _yarn(base: np.ndarray, s: YarnScaling, theta: float, head_dim: int) -> np.ndarray:
    def pair_turning(n_rotations: float) -> float:
        """The (fractional) rotary pair that turns n times within the original context."""
        return head_dim * math.log(s.original_max_positions / (n_rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(s.beta_fast), pair_turning(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the reference's guard against dividing by zero
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = 1 - np.clip(ramp, 0, 1)
    return (1 / (np.float32(s.factor) * base) * (1 - keep) + 1 / base * keep).astype(np.float32)


def rotary_tables(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"], dtype: jnp.dtype
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """cos and sin of every token's angles: computed in float32, then cast to the compute dtype."""
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(rope, head_dim)
    scale = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
    return (jnp.cos(angles) * scale).astype(dtype), (jnp.sin(angles) * scale).astype(dtype)


def rotate(
    x: Float[Array, "B T *heads H"], tables: tuple[Float[Array, "B T R"], Float[Array, "B T R"]]
) -> Float[Array, "B T *heads H"]:
    """Rotate each pair (x[r], x[r + H/2]) by its angle."""
    heads = tuple(range(2, x.ndim - 1))
    cos, sin = (jnp.expand_dims(table, heads) for table in tables)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
