"""The parameters of a decoder: names, shapes and the logical names of their dimensions."""

from __future__ import annotations

from dataclasses import dataclass

from qwen2_jax.config import DecoderConfig

Axes = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class ParamSpec:
    """Shape of one parameter and the logical name of each of its dimensions (see `sharding.ModelSplit`)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


def parameter_specs(
    config: DecoderConfig, *, with_final_norm: bool = True, with_head: bool = True
) -> dict[str, ParamSpec]:
    """Every parameter of the decoder by name; names under `layers.` are stacked along a leading layer axis.

    Weights are (out, in). The head (`lm_head`, which a tied decoder lacks) comes with the final norm that it reads.
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
        axes["lm_head"] = ("vocab", "embed")
    return {name: ParamSpec(tuple(size[dim] for dim in dims), dims) for name, dims in axes.items()}


def _attention_axes(config: DecoderConfig) -> Axes:
    axes: Axes = {"q": ("heads", "embed"), "k": ("kv_heads", "embed"), "v": ("kv_heads", "embed")}
    axes |= _biases(axes) if config.qkv_bias else {}
    if config.qk_norm == "head":
        axes |= {"q_norm": ("head_dim",), "k_norm": ("head_dim",)}
    if config.qk_norm == "full":
        axes |= {"q_norm": ("heads",), "k_norm": ("kv_heads",)}
    out: Axes = {"o": ("embed", "heads")}
    return axes | out | (_biases(out) if config.o_bias else {})


def _mlp_axes(config: DecoderConfig) -> Axes:
    gate: Axes = {"gate": ("mlp", "embed")} if config.gated_mlp else {}
    axes: Axes = gate | {"up": ("mlp", "embed"), "down": ("embed", "mlp")}
    return axes | (_biases(axes) if config.mlp_bias else {})


def _norm_axes(config: DecoderConfig) -> Axes:
    pre = ("attn_norm", "mlp_norm") if config.pre_norm else ()
    post = ("attn_post_norm", "mlp_post_norm") if config.post_norm else ()
    axes: Axes = {}
    for name in (*pre, *post):
        axes |= _norm(name, config)
    return axes


def _norm(name: str, config: DecoderConfig) -> Axes:
    weight: Axes = {name: ("embed",)}
    return weight | (_biases(weight) if config.norm == "layer" else {})


def _biases(weights: Axes) -> Axes:
    return {f"{name}_bias": dims[:1] for name, dims in weights.items()}
