"""What a decoder is made of: frozen, hashable descriptions that a compiled program may depend on.

A family module (`qwen2.py`, `llama.py`) maps a published config onto `DecoderConfig`; nothing after it knows families.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearScaling:
    """Every rotary frequency divided by `factor` (position interpolation)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth blend between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071). `attention_factor` multiplies cos and sin."""

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class FrequencyDivisors:
    """One divisor per rotary frequency, as a GGUF file's `rope_freqs.weight` states them."""

    values: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | FrequencyDivisors


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding over the whole head, half-split; `scaling=None` is the plain form."""

    theta: float
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm decoder: RMSNorm, rotary attention with grouped kv heads, gated MLP.

    `windows` holds one entry a layer: how many tokens a query may see, itself included, or None for all before it.
    """

    family: str
    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tie_embeddings: bool
    windows: tuple[int | None, ...]
    max_positions: int
    activation: str
