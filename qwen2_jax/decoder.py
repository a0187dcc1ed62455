"""The decoder all families share, with its taps.

Axes: B rows, T tokens, D d_model, F d_ff, N query heads, K kv heads, G = N / K, H head_dim, L layers, V vocab.
Weights lie as published, (out, in), with a leading L where there is one per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qwen2_jax.attention import attention
from qwen2_jax.config import DecoderConfig
from qwen2_jax.errors import ModelError
from qwen2_jax.rope import rotary_tables, rotate
from qwen2_jax.sharding import parameter_sharding
from qwen2_jax.taps import Capture

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}
NO_WINDOW = np.iinfo(np.int32).max


@dataclass(frozen=True)
class ParamSpec:
    """Shape of one parameter and the logical name of each of its dimensions (see `sharding.RULES`)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


def parameter_specs(config: DecoderConfig, *, with_head: bool = True) -> dict[str, ParamSpec]:
    """Every parameter of the decoder by name; names under `layers.` are stacked along a leading layer axis."""
    size = {
        "embed": config.d_model,
        "heads": config.n_heads * config.head_dim,
        "kv_heads": config.n_kv_heads * config.head_dim,
        "mlp": config.d_ff,
        "vocab": config.vocab_size,
        "layers": config.n_layers,
    }
    layer: dict[str, tuple[str, ...]] = {
        "attn_norm": ("embed",),
        "q": ("heads", "embed"),
        "k": ("kv_heads", "embed"),
        "v": ("kv_heads", "embed"),
        "o": ("embed", "heads"),
        "mlp_norm": ("embed",),
        "gate": ("mlp", "embed"),
        "up": ("mlp", "embed"),
        "down": ("embed", "mlp"),
    }
    biased = {"q": config.qkv_bias, "k": config.qkv_bias, "v": config.qkv_bias, "o": config.o_bias}
    biased |= dict.fromkeys(("gate", "up", "down"), config.mlp_bias)
    layer |= {f"{name}_bias": layer[name][:1] for name, has_bias in biased.items() if has_bias}
    axes = {"embedding": ("vocab", "embed")} | {f"layers.{name}": ("layers", *dims) for name, dims in layer.items()}
    if with_head:
        axes["final_norm"] = ("embed",)
        if not config.tie_embeddings:
            axes["lm_head"] = ("vocab", "embed")
    return {name: ParamSpec(tuple(size[dim] for dim in dims), dims) for name, dims in axes.items()}


def linear(
    x: Float[Array, "B T I"], weight: Float[Array, "O I"], bias: Float[Array, " O"] | None = None
) -> Float[Array, "B T O"]:
    """x @ weight.T + bias. float32 asks for full precision: accelerators otherwise multiply it in bf16 or TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jnp.einsum("BTI,OI->BTO", x, weight, precision=precision)
    return y if bias is None else y + bias


def rms_norm(x: Float[Array, "B T D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "B T D"]:
    """Normalised in float32, cast, then weighted: transformers' order, which bf16 parity depends on."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return weight * x32.astype(x.dtype)


@dataclass(frozen=True)
class BlockContext:
    """What every block of one forward pass shares."""

    segment_ids: Int[Array, "B T"]
    rotary: tuple[Float[Array, "B T R"], Float[Array, "B T R"]]


Layer = Mapping[str, Array]


def attend(x: Float[Array, "B T D"], layer: Layer, ctx: BlockContext, cfg: DecoderConfig) -> Float[Array, "B T D"]:
    """Self-attention with grouped kv heads, output projection included."""
    rows, length, _ = x.shape
    kv_heads = (rows, length, cfg.n_kv_heads)
    q = linear(x, layer["q"], layer.get("q_bias")).reshape(*kv_heads, cfg.n_heads // cfg.n_kv_heads, cfg.head_dim)
    k = linear(x, layer["k"], layer.get("k_bias")).reshape(*kv_heads, cfg.head_dim)
    v = linear(x, layer["v"], layer.get("v_bias")).reshape(*kv_heads, cfg.head_dim)
    q, k = rotate(q, ctx.rotary), rotate(k, ctx.rotary)
    heads = attention(q, k, v, ctx.segment_ids, scale=cfg.head_dim**-0.5, window=layer.get("window"))
    return linear(heads.reshape(rows, length, -1), layer["o"], layer.get("o_bias"))


def gated_mlp(x: Float[Array, "B T D"], layer: Layer, cfg: DecoderConfig) -> Float[Array, "B T D"]:
    """down(activation(gate(x)) * up(x))."""
    gate = ACTIVATIONS[cfg.activation](linear(x, layer["gate"], layer.get("gate_bias")))
    return linear(gate * linear(x, layer["up"], layer.get("up_bias")), layer["down"], layer.get("down_bias"))


def decoder_block(
    x: Float[Array, "B T D"], layer: Layer, ctx: BlockContext, cfg: DecoderConfig
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B T D"]]]:
    """Returns the new residual stream and what each site of `taps.SITES` saw."""
    taps = {"resid_pre": x}
    taps["attn"] = attend(rms_norm(x, layer["attn_norm"], cfg.norm_eps), layer, ctx, cfg)
    x = taps["resid_mid"] = x + taps["attn"]
    taps["mlp"] = gated_mlp(rms_norm(x, layer["mlp_norm"], cfg.norm_eps), layer, cfg)
    x = taps["residual"] = x + taps["mlp"]
    return x, taps


def layer_runs(captured: tuple[int, ...], end: int) -> Iterator[tuple[range, bool]]:
    """Cut layers 0..end-1 into runs that are captured throughout or not at all."""
    for is_captured, run in groupby(range(end), key=set(captured).__contains__):
        layers = list(run)
        yield range(layers[0], layers[-1] + 1), is_captured


class Decoder(nnx.Module):
    """A decoder whose forward pass returns what was asked for and computes nothing behind it.

    Split it with `nnx.split` and pass the state through `jax.jit`; `Capture` must be static there.
    `params` are the arrays of `parameter_specs(config)`; their dtype is the compute dtype.
    """

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any]) -> None:
        self.config = config
        self.embedding = nnx.Param(params["embedding"])
        stacked = {name.removeprefix("layers."): a for name, a in params.items() if name.startswith("layers.")}
        self.layers = nnx.Dict({name: nnx.Param(array) for name, array in stacked.items()})
        self.head = nnx.Dict({name: nnx.Param(params[name]) for name in ("final_norm", "lm_head") if name in params})

    @classmethod
    def abstract(
        cls,
        config: DecoderConfig,
        dtype: jnp.dtype,
        *,
        mesh: jax.sharding.Mesh | None = None,
        with_head: bool = True,
    ) -> Decoder:
        """The decoder with shapes for arrays: enough to lower and compile, no memory used."""

        def shape(spec: ParamSpec) -> jax.ShapeDtypeStruct:
            sharding = None if mesh is None else parameter_sharding(mesh, spec.axes)
            return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding)

        return cls(config, {name: shape(spec) for name, spec in parameter_specs(config, with_head=with_head).items()})

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        capture: Capture,
    ) -> dict[str, Array]:
        """Site -> (len(capture.layers), B, T, D) in the compute dtype; "logits" -> (B, T, V) only when asked.

        segment_ids: 0 is padding, whose outputs mean nothing. positions: restart at 0 with every segment.
        Raises `ModelError` when a layer does not exist or logits are asked of a decoder loaded without its head.
        """
        self._check(capture)
        dtype = self.embedding.dtype
        x = self.embedding[...][tokens]
        rotary = rotary_tables(self.config.rope, self.config.head_dim, positions, dtype)
        ctx = BlockContext(segment_ids, rotary)
        kept: list[dict[str, Array]] = []
        for layers, is_captured in layer_runs(capture.layers, self._end(capture)):
            x, taps = self._run(x, layers, ctx, capture.sites if is_captured else ())
            if is_captured:
                kept.append(taps)
        out = {site: jnp.concatenate([taps[site] for taps in kept]) for site in capture.sites if kept}
        if capture.logits:
            out["logits"] = self._logits(x)
        return out

    def _check(self, capture: Capture) -> None:
        n_layers = self.config.n_layers
        if missing := [layer for layer in capture.layers if not 0 <= layer < n_layers]:
            raise ModelError(f"layer {missing[0]} does not exist: this model has layers 0 to {n_layers - 1}")
        if capture.logits and not self.head:
            raise ModelError("logits need the final norm and the output head: load all layers with with_head=True")

    def _end(self, capture: Capture) -> int:
        return self.config.n_layers if capture.logits else capture.layers[-1] + 1

    def _run(
        self, x: Float[Array, "B T D"], layers: range, ctx: BlockContext, sites: tuple[str, ...]
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "n B T D"]]]:
        """Apply consecutive layers, keeping the named sites of each.

        The stacked weights are indexed inside the scan, never sliced for it: a slice may be a copy of the weights.
        A single layer is inlined, so that what nobody reads (the MLP of the last layer when only `attn` is kept) is
        dead code to the compiler.
        """
        stacked = {name: param[...] for name, param in self.layers.items()}
        if any(self.config.windows):
            stacked["window"] = jnp.asarray([w or NO_WINDOW for w in self.config.windows], jnp.int32)

        def step(x: Array, layer: int | Array) -> tuple[Array, dict[str, Array]]:
            weights = {name: jax.lax.dynamic_index_in_dim(p, layer, keepdims=False) for name, p in stacked.items()}
            x, taps = decoder_block(x, weights, ctx, self.config)
            return x, {site: taps[site] for site in sites}

        if len(layers) == 1:
            x, taps = step(x, layers[0])
            return x, {site: tap[None] for site, tap in taps.items()}
        return jax.lax.scan(step, x, jnp.arange(layers.start, layers.stop))

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        x = rms_norm(x, self.head["final_norm"][...], self.config.norm_eps)
        unembedding = self.embedding if self.config.tie_embeddings else self.head["lm_head"]
        return linear(x, unembedding[...])
