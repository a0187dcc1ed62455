"""One block of the decoder: attention, MLP, the norms around them, and what each site saw.

Axes: B rows, T tokens, D d_model, F d_ff, N query heads, K kv heads, G = N / K, H head_dim; side by side, Q = N H and
C = K H.
How many heads and neurons there are follows from the weights, which may be a device's share of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from qwen2_jax.activations import activate
from qwen2_jax.attention import attention
from qwen2_jax.attention.logits import Scale
from qwen2_jax.config import DecoderConfig
from qwen2_jax.linear import Linear
from qwen2_jax.norms import Norm
from qwen2_jax.parameters import Parameters
from qwen2_jax.rope import Tables
from qwen2_jax.sharding import MeshAxes, ModelSplit

# By site; see `taps.SITES`.
Taps = dict[str, Float[Array, "B T W"]]
_WIDE = 2048
_TOKENS_OVER_FEATURES = Layout(major_to_minor=(0, 1, 2))


@dataclass(frozen=True)
class LayerContext:
    """What one layer of a forward pass is given beside the residual stream.

    rotary: None where nothing rotates. window: in tokens; None where no layer has one.
    split: which of the weights are only a device's share.
    """

    segment_ids: Int[Array, "B T"]
    rotary: Tables | None
    window: Int[Array, ""] | None
    query_scale: Scale
    split: ModelSplit


class Attention(nnx.Module):
    """Causal self-attention with grouped queries, inside segments."""

    def __init__(self, config: DecoderConfig, parameters: Parameters) -> None:
        self.head_dim, self.qk_norm, self.softcap = config.head_dim, config.qk_norm, config.attn_softcap
        self.q = Linear("BTD,QD->BTQ", parameters.of("q"))
        self.k = Linear("BTD,CD->BTC", parameters.of("k"))
        self.v = Linear("BTD,CD->BTC", parameters.of("v"))
        # I, J, K for K, G, H: einsum sums over axes in the order of their letters, which then is that in memory.
        self.o = Linear("BTIJK,DIJK->BTD", parameters.of("o"))
        self.q_norm, self.k_norm = (
            None if config.qk_norm is None else Norm(config.norm, config.norm_eps, parameters.of(name))
            for name in ("q_norm", "k_norm")
        )

    def __call__(self, x: Float[Array, "B T D"], ctx: LayerContext) -> Taps:
        """From what it reads to its output projection: q, k, v, attn_heads, attn_proj."""
        taps = {"q": self.q(x), "k": self.k(x), "v": self.v(x)}
        q = self._normed_heads(taps["q"], self.q_norm, ctx.split.heads)
        k = self._normed_heads(taps["k"], self.k_norm, ctx.split.kv_heads)
        heads = attention(
            q.reshape(*k.shape[:3], -1, self.head_dim),
            k,
            self._heads(taps["v"]),
            ctx.segment_ids,
            scale=ctx.query_scale,
            window=ctx.window,
            softcap=self.softcap,
            rotary=ctx.rotary,
        )
        taps["attn_heads"] = heads.reshape(*x.shape[:2], -1)
        taps["attn_proj"] = self.o(heads, ctx.split.heads)
        return taps

    def _heads(self, x: Float[Array, "B T Q"]) -> Float[Array, "B T N H"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def _normed_heads(self, x: Float[Array, "B T Q"], norm: Norm | None, over: MeshAxes) -> Float[Array, "B T N H"]:
        """Each head by itself, or all of them at once."""
        if norm is None:
            return self._heads(x)
        return self._heads(norm(x, over)) if self.qk_norm == "full" else norm(self._heads(x))


class Mlp(nnx.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate."""

    def __init__(self, config: DecoderConfig, parameters: Parameters) -> None:
        self.activation = config.activation
        self.gate = Linear("BTD,FD->BTF", parameters.of("gate")) if config.gated_mlp else None
        self.up = Linear("BTD,FD->BTF", parameters.of("up"))
        self.down = Linear("BTF,DF->BTD", parameters.of("down"))

    def __call__(self, x: Float[Array, "B T D"], split: ModelSplit) -> Taps:
        """mlp_act and mlp_proj."""
        up = self.up(x)
        neurons = activate(self.activation, up if self.gate is None else self.gate(x))
        # XLA for TPU otherwise computes gate and down in one fusion, at two thirds of the speed of the two alone.
        neurons = jax.lax.optimization_barrier(neurons if self.gate is None else neurons * up)
        return {"mlp_act": neurons, "mlp_proj": self.down(neurons, split.mlp)}


class Block(nnx.Module):
    """A layer of the decoder. The parameters of all layers are stacked in one, which `layers.run_layers` runs."""

    def __init__(self, config: DecoderConfig, parameters: Parameters) -> None:
        def norm(name: str, *, exists: bool) -> Norm | None:
            return Norm(config.norm, config.norm_eps, parameters.of(name)) if exists else None

        self.parallel = config.parallel
        self.attn_norm = norm("attn_norm", exists=config.pre_norm)
        self.attn = Attention(config, parameters.of("attn"))
        self.attn_post_norm = norm("attn_post_norm", exists=config.post_norm)
        self.mlp_norm = norm("mlp_norm", exists=config.pre_norm)
        self.mlp = Mlp(config, parameters.of("mlp"))
        self.mlp_post_norm = norm("mlp_post_norm", exists=config.post_norm)

    def __call__(self, x: Float[Array, "B T D"], ctx: LayerContext) -> tuple[Float[Array, "B T D"], Taps]:
        """Returns the new residual stream and what each site of `taps.SITES` saw."""
        taps = {"resid_pre": x}
        taps |= self.attn(_normed(x, self.attn_norm), ctx)
        taps["attn"] = _normed(taps["attn_proj"], self.attn_post_norm)
        middle = x if self.parallel else x + taps["attn"]
        taps |= self.mlp(self._mlp_input(middle), ctx.split)
        taps["mlp"] = _normed(taps["mlp_proj"], self.mlp_post_norm)
        if self.parallel:
            taps["residual"] = taps["mlp"] + taps["attn"] + x  # transformers' order
        else:
            taps |= {"resid_mid": middle, "residual": middle + taps["mlp"]}
        # Tokens over features, as it is stored: the compiler may prefer another order inside and copy all at the end.
        taps["residual"] = with_layout_constraint(taps["residual"], _TOKENS_OVER_FEATURES)
        return taps["residual"], taps

    def _mlp_input(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.mlp_norm is None:
            return x
        normed = self.mlp_norm(x)
        # Where a token is wide, XLA for TPU otherwise normalises it anew for every block of neurons.
        return jax.lax.optimization_barrier(normed) if x.shape[-1] >= _WIDE else normed


def _normed(x: Float[Array, "B T D"], norm: Norm | None) -> Float[Array, "B T D"]:
    return x if norm is None else norm(x)
