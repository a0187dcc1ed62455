"""The parameters of a decoder: names, shapes and the logical names of their dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from qwen2_jax.config import DecoderConfig

Axes = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class ParamSpec:
    """Shape of one parameter and the logical name of each of its dimensions (see `sharding.ModelSplit`)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        """Whether it has a leading layer axis."""
        return self.axes[0] == "layers"


@dataclass(frozen=True)
class Parameters:
    """The parameters of a module, by their names in it.

    values: arrays, or their shapes, by full name. specs: of the whole decoder. prefix: where in it the module is.
    """

    values: Mapping[str, Any]
    specs: Mapping[str, ParamSpec]
    prefix: str = ""

    def of(self, part: str) -> Parameters:
        """Those of a named part."""
        return Parameters(self.values, self.specs, f"{self.prefix}{part}.")

    def get(self, name: str) -> nnx.Param[Any] | None:
        """None where there is none; see `require`."""
        return self.require(name) if self.prefix + name in self.values else None

    def require(self, name: str) -> nnx.Param[Any]:
        """The parameter, with its logical axes as nnx's `out_sharding`."""
        full = self.prefix + name
        # Laid out over the devices when it was loaded, so nnx has nothing to shard.
        return nnx.Param(self.values[full], out_sharding=self.specs[full].axes, eager_sharding=False)

    def __bool__(self) -> bool:
        return any(name.startswith(self.prefix) for name in self.values)


def parameter_specs(
    config: DecoderConfig, *, with_final_norm: bool = True, with_head: bool = True
) -> dict[str, ParamSpec]:
    """Every parameter of the decoder by its path in the module; those of `layers` are stacked along a leading axis.

    Weights are (out, in), with the dimensions of all heads side by side: weights by heads cost 2% of a step of
    Qwen2.5-1.5B and of Gemma-2-9b, by the TPU's compiler. The head (`lm_head`, which a tied decoder lacks) comes with
    the final norm that it reads.
    """
    size = {
        "layers": config.n_layers,
        "vocab": config.vocab_size,
        "positions": config.max_positions,
        "embed": config.d_model,
        "heads": config.n_heads * config.head_dim,
        "kv_heads": config.n_kv_heads * config.head_dim,
        "head_dim": config.head_dim,
        "mlp": config.d_ff,
    }
    axes: Axes = {"embedding": ("vocab", "embed")}
    if config.learned_positions:
        axes["position_embedding"] = ("positions", "embed")
    layer = _attention_axes(config) | _mlp_axes(config) | _norm_axes(config)
    axes |= {f"layers.{name}": ("layers", *dims) for name, dims in layer.items()}
    if with_final_norm or with_head:
        axes |= _norm("final_norm", config)
    if with_head and not config.tie_embeddings:
        axes["lm_head.weight"] = ("vocab", "embed")
    return {name: ParamSpec(tuple(size[dim] for dim in dims), dims) for name, dims in axes.items()}


def _attention_axes(config: DecoderConfig) -> Axes:
    axes: Axes = {}
    for name, heads in {"q": "heads", "k": "kv_heads", "v": "kv_heads"}.items():
        axes |= _linear(f"attn.{name}", (heads, "embed"), has_bias=config.qkv_bias)
    if config.qk_norm == "head":
        axes |= {"attn.q_norm.weight": ("head_dim",), "attn.k_norm.weight": ("head_dim",)}
    if config.qk_norm == "full":
        axes |= {"attn.q_norm.weight": ("heads",), "attn.k_norm.weight": ("kv_heads",)}
    return axes | _linear("attn.o", ("embed", "heads"), has_bias=config.o_bias)


def _mlp_axes(config: DecoderConfig) -> Axes:
    axes: Axes = {}
    for name in ("gate", "up") if config.gated_mlp else ("up",):
        axes |= _linear(f"mlp.{name}", ("mlp", "embed"), has_bias=config.mlp_bias)
    return axes | _linear("mlp.down", ("embed", "mlp"), has_bias=config.mlp_bias)


def _norm_axes(config: DecoderConfig) -> Axes:
    pre = ("attn_norm", "mlp_norm") if config.pre_norm else ()
    post = ("attn_post_norm", "mlp_post_norm") if config.post_norm else ()
    axes: Axes = {}
    for name in (*pre, *post):
        axes |= _norm(name, config)
    return axes


def _norm(name: str, config: DecoderConfig) -> Axes:
    return _linear(name, ("embed",), has_bias=config.norm == "layer")


def _linear(name: str, axes: tuple[str, ...], *, has_bias: bool) -> Axes:
    return {f"{name}.weight": axes} | ({f"{name}.bias": axes[:1]} if has_bias else {})
