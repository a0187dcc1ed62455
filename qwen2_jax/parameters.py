"""The parameters of a decoder: names, shapes and the logical names of their dimensions.

Axes: L layers, V vocab, P positions, D d_model, F d_ff, N query heads, K kv heads, H head_dim.
"""

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

    @property
    def matrix(self) -> ParamSpec:
        """The same values with the dimensions of a head beside those of the next, as checkpoints have them."""
        shape: list[int] = []
        axes: list[str] = []
        for size, axis in zip(self.shape, self.axes, strict=True):
            if axis == "head_dim" and axes[-1] in ("heads", "kv_heads"):
                shape[-1] *= size
            else:
                shape.append(size)
                axes.append(axis)
        return ParamSpec(tuple(shape), tuple(axes))


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

    The head (`lm_head`, which a tied decoder lacks) comes with the final norm that it reads.
    """
    size = {
        "layers": config.n_layers,
        "vocab": config.vocab_size,
        "positions": config.max_positions,
        "embed": config.d_model,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
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
    heads = {"q": ("heads", "head_dim"), "k": ("kv_heads", "head_dim"), "v": ("kv_heads", "head_dim")}
    axes: Axes = {}
    for name, dims in heads.items():
        axes |= _linear(f"attention.{name}", (*dims, "embed"), dims if config.qkv_bias else None)
    if config.qk_norm is not None:
        axes |= {
            f"attention.{name}_norm.weight": heads[name] if config.qk_norm == "full" else ("head_dim",)
            for name in ("q", "k")
        }
    return axes | _linear("attention.o", ("embed", "heads", "head_dim"), ("embed",) if config.o_bias else None)


def _mlp_axes(config: DecoderConfig) -> Axes:
    neurons, residual = (("mlp",), ("embed",)) if config.mlp_bias else (None, None)
    gate = _linear("mlp.gate", ("mlp", "embed"), neurons) if config.gated_mlp else {}
    return gate | _linear("mlp.up", ("mlp", "embed"), neurons) | _linear("mlp.down", ("embed", "mlp"), residual)


def _norm_axes(config: DecoderConfig) -> Axes:
    pre = ("attn_norm", "mlp_norm") if config.pre_norm else ()
    post = ("attn_post_norm", "mlp_post_norm") if config.post_norm else ()
    axes: Axes = {}
    for name in (*pre, *post):
        axes |= _norm(name, config)
    return axes


def _norm(name: str, config: DecoderConfig) -> Axes:
    return _linear(name, ("embed",), ("embed",) if config.norm == "layer" else None)


def _linear(name: str, weight: tuple[str, ...], bias: tuple[str, ...] | None) -> Axes:
    return {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
