"""What a decoder is made of: frozen, hashable descriptions that a compiled program may depend on.

A family module (`llama.py`, `gpt_neox.py`, …) maps a published config onto `DecoderConfig`; nothing after it knows
families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qwen2_jax.taps import SITES


@dataclass(frozen=True)
class LinearScaling:
    """Every rotary frequency divided by `factor` (position interpolation)."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """Dynamic NTK: samples longer than `original_max_positions` get a larger theta, the larger the longer they are."""

    factor: float
    original_max_positions: int


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
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753): one divisor per rotary frequency, `long` for samples of more than
    `original_max_positions` tokens and `short` for the others. `attention_factor` multiplies cos and sin."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_positions: int
    attention_factor: float


@dataclass(frozen=True)
class FrequencyDivisors:
    """One divisor per rotary frequency, as a GGUF file's `rope_freqs.weight` states them."""

    values: tuple[float, ...]


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling | FrequencyDivisors


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of the first `rotary_dim` dimensions of every head, half-split.

    `scaling=None` is the plain form.
    """

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


NormKind = Literal["rms", "rms_f32", "rms_plus_one", "layer"]


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder with grouped-query attention. The defaults are Llama's block; what differs is said by a field.

    windows: one entry a layer: how many tokens a query may see, itself included, or None for all before it.
    query_scale: what the dot products of queries and keys are multiplied by; with `scale_by_inverse_layer` also
        divided by the layer's number, counted from 1 (GPT-2).
    norm: "rms" normalises in float32, casts and multiplies by the weight; "rms_f32" multiplies before it casts
        (OLMo-2); "rms_plus_one" so too, by 1 + weight (Gemma); "layer" is LayerNorm with weight and bias.
    pre_norm: norms of what attention and MLP read. post_norm: norms of what they put out, before it is added to the
        residual stream (OLMo-2 has these alone, Gemma-2 and Gemma-3 both).
    parallel: attention and MLP both read the residual stream before the block (GPT-NeoX).
    qk_norm: norm of queries and keys, over each head (Qwen3, Gemma-3) or over all heads at once (OLMo-2).
    rope: None where nothing rotates. local_rope: of the layers that have a window, where it differs (Gemma-3).
    learned_positions: an embedding of `max_positions` positions is added to that of the tokens (GPT-2).
    embedding_scale: what token embeddings are multiplied by, rounded to the compute dtype first (Gemma).
    attn_softcap, final_softcap: logits become cap * tanh(logits / cap) (Gemma-2).
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
    rope: RopeConfig | None
    query_scale: float
    activation: str
    tie_embeddings: bool
    windows: tuple[int | None, ...]
    max_positions: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    norm: NormKind = "rms"
    pre_norm: bool = True
    post_norm: bool = False
    parallel: bool = False
    qk_norm: Literal["head", "full"] | None = None
    local_rope: RopeConfig | None = None
    learned_positions: bool = False
    embedding_scale: float | None = None
    scale_by_inverse_layer: bool = False
    attn_softcap: float | None = None
    final_softcap: float | None = None

    @property
    def site_widths(self) -> Mapping[str, int]:
        """The sites this decoder has, in the order of `taps.SITES`, and how wide each one's vectors are."""
        narrow = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads, "attn_heads": self.n_heads}
        widths = {site: heads * self.head_dim for site, heads in narrow.items()} | {"mlp_act": self.d_ff}
        absent = set() if self.post_norm else {"attn_proj", "mlp_proj"}
        absent |= {"resid_mid"} if self.parallel else set()
        return {site: widths.get(site, self.d_model) for site in SITES if site not in absent}
