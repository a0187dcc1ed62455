"""One block of the decoder: attention, MLP, the norms around them, and what each site saw.

Axes: B rows, T tokens, D d_model, F d_ff, N query heads, K kv heads, G = N / K, H head_dim.
How many heads and neurons there are is told by the weights, which may be a device's share of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from qwen2_jax.activations import activate
from qwen2_jax.attention import attention
from qwen2_jax.config import DecoderConfig
from qwen2_jax.norms import norm
from qwen2_jax.rope import Tables
from qwen2_jax.sharding import MeshAxes, ModelSplit, sum_over

Taps = dict[str, Array]
_WIDE = 2048
_TOKENS_OVER_FEATURES = Layout(major_to_minor=(0, 1, 2))


@dataclass(frozen=True)
class BlockContext:
    """What every block of one forward pass shares. local_rotary: of the layers with a window, where it differs.

    split: which of the weights are only a device's share.
    """

    segment_ids: Int[Array, "B T"]
    rotary: Tables | None
    local_rotary: Tables | None
    split: ModelSplit


# The weights of one layer by name, and what `decoder.layer_constants` says of it.
Layer = Mapping[str, Array]


def linear(x: Float[Array, "B T I"], weights: Layer, name: str) -> Float[Array, "B T O"]:
    """x @ weight.T + bias, rounded once."""
    with jax.named_scope(name):
        return _plus_bias(_product(x, weights, name), weights, name, x.dtype)


def project_back(x: Float[Array, "B T *I"], weights: Layer, name: str, over: MeshAxes) -> Float[Array, "B T D"]:
    """`linear` from heads or neurons back to the residual stream.

    Heads may come with an axis for each of (K, G, H): whoever made them need not bring these side by side.
    over: the mesh axes over which the heads or neurons are split; the sum over devices comes before the bias.
    """
    with jax.named_scope(name):
        y = _product(x, weights, name, unrounded=bool(over))
        return _plus_bias(sum_over(y, over), weights, name, x.dtype)


def _product(x: Float[Array, "B T *I"], weights: Layer, name: str, *, unrounded: bool = False) -> Float[Array, "B T O"]:
    """float32 asks for full precision: accelerators otherwise multiply it in bf16 or TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    weight = weights[name].reshape(-1, *x.shape[2:])
    inner = "IJK"[: x.ndim - 2]
    product = partial(jnp.einsum, f"BT{inner},O{inner}->BTO", precision=precision)
    in_float32 = partial(product, preferred_element_type=jnp.float32)
    if unrounded or f"{name}_bias" in weights:
        return in_float32(x, weight)

    def rounded(x: Array, weight: Array) -> Array:
        return in_float32(x, weight).astype(x.dtype)

    # XLA:CPU has bfloat16 instructions for products in float32 alone: one that rounds by itself takes twice as long.
    return jax.lax.platform_dependent(x, weight, cpu=rounded, default=product)


def _plus_bias(y: Float[Array, "B T O"], weights: Layer, name: str, dtype: jnp.dtype) -> Float[Array, "B T O"]:
    bias = weights.get(f"{name}_bias")
    return (y if bias is None else y + bias).astype(dtype)


def attend(x: Float[Array, "B T D"], layer: Layer, ctx: BlockContext, cfg: DecoderConfig) -> Taps:
    """Self-attention from what it reads to its output projection: q, k, v, attn_heads, attn_proj."""
    taps = {name: linear(x, layer, name) for name in ("q", "k", "v")}
    q = _normed_heads(taps["q"], "q", layer, cfg, ctx.split.heads)
    k = _normed_heads(taps["k"], "k", layer, cfg, ctx.split.kv_heads)
    v = _heads(taps["v"], cfg)
    groups = (*k.shape[:3], -1, cfg.head_dim)
    heads = attention(
        q.reshape(groups),
        k,
        v,
        ctx.segment_ids,
        scale=_query_scale(layer, cfg),
        window=layer.get("window"),
        softcap=cfg.attn_softcap,
        rotary=_rotary(layer, ctx),
    )
    taps["attn_heads"] = heads.reshape(*x.shape[:2], -1)
    taps["attn_proj"] = project_back(heads, layer, "o", ctx.split.heads)
    return taps


def _heads(x: Float[Array, "B T NH"], cfg: DecoderConfig) -> Float[Array, "B T N H"]:
    return x.reshape(*x.shape[:2], -1, cfg.head_dim)


def _normed_heads(
    x: Float[Array, "B T NH"], name: str, layer: Layer, cfg: DecoderConfig, over: MeshAxes
) -> Float[Array, "B T N H"]:
    if cfg.qk_norm == "full":
        x = norm(x, layer, f"{name}_norm", cfg, over)
    heads = _heads(x, cfg)
    return norm(heads, layer, f"{name}_norm", cfg) if cfg.qk_norm == "head" else heads


def _rotary(layer: Layer, ctx: BlockContext) -> Tables | None:
    if ctx.rotary is None or ctx.local_rotary is None:
        return ctx.rotary
    cos, sin = (jnp.where(layer["is_local"], *pair) for pair in zip(ctx.local_rotary, ctx.rotary, strict=True))
    return cos, sin


def _query_scale(layer: Layer, cfg: DecoderConfig) -> Any:
    """A float, which a kernel can build in, unless it goes by the layer."""
    return cfg.query_scale / layer["number"] if cfg.scale_by_inverse_layer else cfg.query_scale


def mlp(x: Float[Array, "B T D"], layer: Layer, ctx: BlockContext, cfg: DecoderConfig) -> Taps:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate: mlp_act, mlp_proj."""
    up = linear(x, layer, "up")
    neurons = activate(cfg.activation, linear(x, layer, "gate") if cfg.gated_mlp else up)
    # XLA for TPU otherwise computes gate and down in one fusion, at two thirds of the speed of the two alone.
    neurons = jax.lax.optimization_barrier(neurons * up if cfg.gated_mlp else neurons)
    return {"mlp_act": neurons, "mlp_proj": project_back(neurons, layer, "down", ctx.split.mlp)}


def _mlp_input(x: Float[Array, "B T D"], layer: Layer, cfg: DecoderConfig) -> Float[Array, "B T D"]:
    if not cfg.pre_norm:
        return x
    normed = norm(x, layer, "mlp_norm", cfg)
    # Where a token is wide, XLA for TPU otherwise normalises it anew for every block of neurons.
    return jax.lax.optimization_barrier(normed) if cfg.d_model >= _WIDE else normed


def decoder_block(
    x: Float[Array, "B T D"], layer: Layer, ctx: BlockContext, cfg: DecoderConfig
) -> tuple[Float[Array, "B T D"], Taps]:
    """Returns the new residual stream and what each site of `taps.SITES` saw."""
    taps = {"resid_pre": x}
    taps |= attend(norm(x, layer, "attn_norm", cfg) if cfg.pre_norm else x, layer, ctx, cfg)
    taps["attn"] = norm(taps["attn_proj"], layer, "attn_post_norm", cfg) if cfg.post_norm else taps["attn_proj"]
    middle = x if cfg.parallel else x + taps["attn"]
    taps |= mlp(_mlp_input(middle, layer, cfg), layer, ctx, cfg)
    taps["mlp"] = norm(taps["mlp_proj"], layer, "mlp_post_norm", cfg) if cfg.post_norm else taps["mlp_proj"]
    if cfg.parallel:
        taps["residual"] = taps["mlp"] + taps["attn"] + x  # transformers' order
    else:
        taps |= {"resid_mid": middle, "residual": middle + taps["mlp"]}
    # Tokens over features, as it is stored: the compiler may prefer another order inside and copy all at the end.
    taps["residual"] = with_layout_constraint(taps["residual"], _TOKENS_OVER_FEATURES)
    return taps["residual"], taps
