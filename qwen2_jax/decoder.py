"""The decoder all families share, with its taps.

Axes: B rows, T tokens, D d_model, L layers, V vocab.
Weights lie (out, in), with a leading L where there is one per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from core.base.errors import ModelError
from qwen2_jax.block import BlockContext, decoder_block, linear
from qwen2_jax.config import DecoderConfig
from qwen2_jax.norms import norm
from qwen2_jax.parameters import ParamSpec, parameter_specs
from qwen2_jax.rope import rotary_tables
from qwen2_jax.sharding import WHOLE, ModelMesh, ModelSplit, rows_of
from qwen2_jax.taps import Capture

NO_WINDOW = np.iinfo(np.int32).max
HEAD = ("final_norm", "final_norm_bias", "lm_head")

Keep = Callable[[str, Float[Array, "B T W"]], Any]


def layer_runs(captured: tuple[int, ...], end: int) -> Iterator[tuple[range, bool]]:
    """Cut layers 0..end-1 into runs that are captured throughout or not at all."""
    for is_captured, run in groupby(range(end), key=set(captured).__contains__):
        layers = list(run)
        yield range(layers[0], layers[-1] + 1), is_captured


def layer_constants(config: DecoderConfig) -> dict[str, Array]:
    """What the config, not the checkpoint, says of every layer and a block has to be told: name -> (L,)."""
    constants: dict[str, Array] = {}
    if any(config.windows):
        constants["window"] = jnp.asarray([window or NO_WINDOW for window in config.windows], jnp.int32)
    if config.local_rope is not None:
        constants["is_local"] = jnp.asarray([window is not None for window in config.windows])
    if config.scale_by_inverse_layer:
        constants["number"] = jnp.arange(1, config.n_layers + 1, dtype=jnp.float32)
    return constants


def _one_layer(kept: Any) -> Any:
    return jax.tree.map(lambda array: array[None], kept)


class Decoder(nnx.Module):
    """A decoder whose forward pass returns what was asked for and computes nothing behind it.

    Split it with `nnx.split` and pass the state through `jax.jit`; `Capture` must be static there.
    `params` are the arrays of `parameter_specs(config)`; their dtype is the compute dtype.
    """

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any]) -> None:
        self.config = config
        self.embedding = nnx.Param(params["embedding"])
        self.position_embedding = nnx.Param(params["position_embedding"]) if config.learned_positions else None
        stacked = {name.removeprefix("layers."): a for name, a in params.items() if name.startswith("layers.")}
        self.layers = nnx.Dict({name: nnx.Param(array) for name, array in stacked.items()})
        self.head = nnx.Dict({name: nnx.Param(params[name]) for name in HEAD if name in params})

    @classmethod
    def abstract(
        cls,
        config: DecoderConfig,
        dtype: jnp.dtype,
        *,
        mesh: ModelMesh | None = None,
        with_final_norm: bool = True,
        with_head: bool = True,
    ) -> Decoder:
        """The decoder with shapes for arrays: enough to lower and compile, no memory used."""

        def shape(spec: ParamSpec) -> jax.ShapeDtypeStruct:
            sharding = None if mesh is None else mesh.sharding(spec.axes)
            return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding)

        specs = parameter_specs(config, with_final_norm=with_final_norm, with_head=with_head)
        return cls(config, {name: shape(spec) for name, spec in specs.items()})

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        capture: Capture,
        split: ModelSplit = WHOLE,
        keep: Keep = lambda site, tap: tap,
    ) -> dict[str, Any]:
        """Site -> (layers, B, T, width) in the compute dtype; "logits" -> (B, T, V) only when asked.

        layers are `capture.layers_of(site, n_layers)`, width is `config.site_widths[site]`.
        segment_ids: 0 is padding, whose outputs mean nothing. positions: restart at 0 with every segment.
        split: inside `jax.shard_map`, which parameters are a device's share; what is split (`ModelSplit.of_site`) comes
        out as its share too.
        keep: what becomes of a captured (B, T, width) array; what it returns is stacked along a leading layer axis. It
        is part of the layer, so that nothing has to be read again for it.
        Raises `ModelError` for a layer or site that does not exist and for what was not loaded.
        """
        self._check(capture)
        embedded = self._embed(tokens, split)
        x = embedded if self.position_embedding is None else embedded + self.position_embedding[...][positions]
        x, out = self._blocks(x, segment_ids, positions, capture, split, keep)
        if "embedding" in capture.sites:
            out["embedding"] = _one_layer(keep("embedding", embedded))
        if capture.needs_final_norm:
            x = norm(x, {name: param[...] for name, param in self.head.items()}, "final_norm", self.config)
        if "final_norm" in capture.sites:
            out["final_norm"] = _one_layer(keep("final_norm", x))
        if capture.logits:
            out["logits"] = self._logits(x)
        return out

    def _check(self, capture: Capture) -> None:
        config, n_layers = self.config, self.config.n_layers
        if missing := [layer for layer in capture.layers if not 0 <= layer < n_layers]:
            raise ModelError(f"layer {missing[0]} does not exist: this model has layers 0 to {n_layers - 1}")
        if absent := [site for site in capture.sites if site not in config.site_widths]:
            has = ", ".join(config.site_widths)
            raise ModelError(f"site {absent[0]!r} does not exist in a {config.family} block: choose from {has}")
        has_head = config.tie_embeddings or "lm_head" in self.head
        if capture.logits and not ("final_norm" in self.head and has_head):
            raise ModelError("logits need the final norm and the output head: load all layers with with_head=True")
        if capture.needs_final_norm and "final_norm" not in self.head:
            raise ModelError("the final norm is not loaded: load all layers with with_final_norm=True")

    def _embed(self, tokens: Int[Array, "B T"], split: ModelSplit) -> Float[Array, "B T D"]:
        x = rows_of(self.embedding[...], tokens, split.vocab)
        scale = self.config.embedding_scale
        return x if scale is None else x * jnp.asarray(scale, x.dtype)

    def _blocks(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        capture: Capture,
        split: ModelSplit,
        keep: Keep,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """As many blocks as have to run, and the sites of those that are captured."""
        rotary, local_rotary = (
            None if rope is None else rotary_tables(rope, positions, segment_ids)
            for rope in (self.config.rope, self.config.local_rope)
        )
        ctx = BlockContext(segment_ids, rotary, local_rotary, split)
        captured = capture.layers if capture.block_sites else ()
        kept: list[dict[str, Any]] = []
        for layers, is_captured in layer_runs(captured, capture.layers_run(self.config.n_layers)):
            x, taps = self._run(x, layers, ctx, capture.block_sites if is_captured else (), keep)
            if is_captured:
                kept.append(taps)
        return x, jax.tree.map(lambda *runs: jnp.concatenate(runs), *kept) if kept else {}

    def _run(
        self, x: Float[Array, "B T D"], layers: range, ctx: BlockContext, sites: tuple[str, ...], keep: Keep
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Apply consecutive layers, keeping the named sites of each.

        The stacked weights are indexed inside the scan, never sliced for it: a slice may be a copy of the weights.
        A single layer is inlined, so that what nobody reads (the MLP of the last layer when only `attn` is kept) is
        dead code to the compiler.
        """
        stacked = {name: param[...] for name, param in self.layers.items()} | layer_constants(self.config)

        def step(x: Array, layer: int | Array) -> tuple[Array, dict[str, Any]]:
            weights = {name: jax.lax.dynamic_index_in_dim(p, layer, keepdims=False) for name, p in stacked.items()}
            x, taps = decoder_block(x, weights, ctx, self.config)
            return x, {site: keep(site, taps[site]) for site in sites}

        if len(layers) == 1:
            x, taps = step(x, layers[0])
            return x, _one_layer(taps)
        return jax.lax.scan(step, x, jnp.arange(layers.start, layers.stop))

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """x: what the final norm gave."""
        unembedding = self.embedding if self.config.tie_embeddings else self.head["lm_head"]
        logits = linear(x, {"lm_head": unembedding[...]}, "lm_head")
        cap = self.config.final_softcap
        return logits if cap is None else (cap * jnp.tanh(logits.astype(jnp.float32) / cap)).astype(logits.dtype)
