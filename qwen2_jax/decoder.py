"""The decoder that all families share, with its taps.

Axes: B rows, T tokens, D d_model, L captured layers, V vocab, S texts, W width of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from core.base.errors import ModelError
from qwen2_jax.attention.logits import Scale
from qwen2_jax.block import Block, LayerContext
from qwen2_jax.config import DecoderConfig
from qwen2_jax.layers import Keep, LayerNumber, run_layers
from qwen2_jax.linear import Linear, product
from qwen2_jax.norms import Norm
from qwen2_jax.parameters import Parameters, ParamSpec, parameter_specs
from qwen2_jax.rope import Tables, rotary_tables
from qwen2_jax.sharding import DATA_AXIS, WHOLE, ModelMesh, ModelSplit, rows_of
from qwen2_jax.taps import Capture
from qwen2_jax.texts import Found, Texts, TokenIds

NO_WINDOW = np.iinfo(np.int32).max

_LOGITS = Capture((), (), logits=True)
# For layers with a window, and for those without one.
_Rotary = tuple[Tables | None, Tables | None]


class Decoder(nnx.Module):
    """A language model to look into: call it on token ids, or run `forward` on packed rows.

    embedding (V, D), layers (every parameter with a leading layer axis), final_norm and lm_head, where they are loaded
    and the model has them. `nnx.Param`s all; `out_sharding` of each names its axes. Their dtype is the compute dtype.
    """

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any], mesh: ModelMesh | None = None) -> None:
        """params: the arrays, or shapes, of `parameter_specs(config)`, by name. mesh: where they lie, if on several."""
        parameters = Parameters(params, parameter_specs(config))
        self.config, self.mesh = config, mesh
        self.embedding = parameters.require("embedding")
        self.position_embedding = parameters.get("position_embedding")
        self.layers = Block(config, parameters.of("layers"))
        norm, head = parameters.of("final_norm"), parameters.of("lm_head")
        self.final_norm = Norm(config.norm, config.norm_eps, norm) if norm else None
        self.lm_head = Linear("BTD,VD->BTV", head) if head else None

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
        return cls(config, {name: shape(spec) for name, spec in specs.items()}, mesh)

    def __call__(self, token_ids: TokenIds | Sequence[TokenIds], capture: Capture | None = None) -> Found | list[Found]:
        """What the model computes of a text, or of several that do not see each other.

        token_ids: of one text, a list or array of T integers; or of several, a list of such or an (S, T) array.
        capture: what to return; None for the logits alone.

        Returns the next-token logits of a text, (T, V); with `capture` a dict: site -> (L, T, W), L being the layers
        `capture.layers_of(site, n_layers)` and W `config.site_widths[site]`, and "logits" -> (T, V) where it asks for
        them. Of a list of texts a list of the same, without padding; of an (S, T) array the same with S before T. All
        are in the compute dtype, on the device.

        Each text is a row of its own. Compiled anew for another capture, number of texts, or length of the longest,
        which is rounded up. Raises `ModelError` for token ids that the model does not have, for a text that is too
        long, and as `forward` does.
        """
        asked = _LOGITS if capture is None else capture
        self._check(asked)
        texts = Texts.of(token_ids, self.config.vocab_size, self.config.max_positions)
        graph, state = nnx.split(self)
        rows = texts.rows(1 if self.mesh is None else self.mesh.mesh.shape[DATA_AXIS])
        found = texts.without_padding(_forward(graph, asked, state, *rows))
        if capture is not None:
            return found
        return [of_text["logits"] for of_text in found] if isinstance(found, list) else found["logits"]

    def forward(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        capture: Capture,
        split: ModelSplit = WHOLE,
        keep: Keep = lambda site, tap: tap,
    ) -> dict[str, Any]:
        """The pass over packed rows, to be traced: `nnx.split` the decoder and pass its state through `jax.jit`.

        Returns site -> (L, B, T, W) in the compute dtype, as of `__call__`; "logits" -> (B, T, V) only when asked.
        Nothing after what is asked for is computed.

        segment_ids: 0 is padding, whose outputs mean nothing. positions: restart at 0 with every segment.
        split: inside `jax.shard_map` (with check_vma=False), which parameters are a device's share; what is split
        (`ModelSplit.of_site`) comes out as its share too.
        keep: what becomes of a captured (B, T, W) array; what it returns is stacked along a leading layer axis. It is
        part of the layer, so that nothing has to be read again for it.
        Raises `ModelError` for a layer or site that does not exist and for what was not loaded.
        """
        self._check(capture)
        embedded = self._embed(tokens, split)
        x = embedded if self.position_embedding is None else embedded + self.position_embedding[...][positions]
        contexts = partial(self._context, segment_ids, self._rotary(positions, segment_ids), split)
        captured = capture.layers if capture.block_sites else ()
        n_run = capture.layers_run(self.config.n_layers)
        x, out = run_layers(self.layers, x, contexts, n_run, captured, capture.block_sites, keep)
        if "embedding" in capture.sites:
            out["embedding"] = _one_layer(keep("embedding", embedded))
        if capture.needs_final_norm:
            assert self.final_norm is not None
            x = self.final_norm(x)
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
        has_head = config.tie_embeddings or self.lm_head is not None
        if capture.logits and (self.final_norm is None or not has_head):
            raise ModelError("logits need the final norm and the output head: load all layers with with_head=True")
        if capture.needs_final_norm and self.final_norm is None:
            raise ModelError("the final norm is not loaded: load all layers with with_final_norm=True")

    def _embed(self, tokens: Int[Array, "B T"], split: ModelSplit) -> Float[Array, "B T D"]:
        x = rows_of(self.embedding[...], tokens, split.vocab)
        scale = self.config.embedding_scale
        return x if scale is None else x * jnp.asarray(scale, x.dtype)

    def _rotary(self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> _Rotary:
        rope, local = self.config.rope, self.config.local_rope
        tables = None if rope is None else rotary_tables(rope, positions, segment_ids)
        return tables if local is None else rotary_tables(local, positions, segment_ids), tables

    def _context(
        self, segment_ids: Int[Array, "B T"], rotary: _Rotary, split: ModelSplit, layer: LayerNumber
    ) -> LayerContext:
        """What the config says of one layer, whose number may be traced."""
        config = self.config
        local, tables = rotary
        if config.local_rope is not None:
            assert local is not None
            assert tables is not None
            is_local = jnp.asarray([window is not None for window in config.windows])[layer]
            cos, sin = (jnp.where(is_local, *pair) for pair in zip(local, tables, strict=True))
            tables = cos, sin
        window = None
        if any(config.windows):
            window = jnp.asarray([window or NO_WINDOW for window in config.windows], jnp.int32)[layer]
        scale: Scale = config.query_scale
        if config.scale_by_inverse_layer:
            scale = scale / jnp.arange(1, config.n_layers + 1, dtype=jnp.float32)[layer]
        return LayerContext(segment_ids, tables, window, scale, split)

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """x: what the final norm gave."""
        logits = product("BTD,VD->BTV", x, self.embedding[...]) if self.lm_head is None else self.lm_head(x)
        cap = self.config.final_softcap
        return logits if cap is None else (cap * jnp.tanh(logits.astype(jnp.float32) / cap)).astype(logits.dtype)


def _one_layer(outputs: Any) -> Any:
    return jax.tree.map(lambda array: array[None], outputs)


@partial(jax.jit, static_argnums=(0, 1))
def _forward(
    graph: nnx.GraphDef[Decoder],
    capture: Capture,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> dict[str, Float[Array, "..."]]:
    """`Decoder.forward`; on a mesh each device computes its rows with its share of the weights."""
    mesh = nnx.merge(graph, state).mesh
    split = WHOLE if mesh is None else mesh.split

    def forward(state: nnx.State, tokens: Array, segment_ids: Array, positions: Array) -> dict[str, Array]:
        return nnx.merge(graph, state).forward(tokens, segment_ids, positions, capture, split)

    if mesh is None:
        return forward(state, tokens, segment_ids, positions)
    in_specs = (mesh.parameter_specs(state), mesh.rows, mesh.rows, mesh.rows)
    specs = {name: mesh.output_spec(name) for name in (*capture.sites, *(["logits"] if capture.logits else []))}
    mapped = jax.shard_map(forward, mesh=mesh.mesh, in_specs=in_specs, out_specs=specs, check_vma=False)
    return mapped(state, tokens, segment_ids, positions)
