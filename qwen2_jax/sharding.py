"""How a model lies on the devices of a mesh: one table from the logical axes of its parameters to the mesh's axes.

A mesh is (data, kv, group). The batch is split over `data`. A model that does not fit one device is split over the
other two: kv heads over `kv`, the query heads that share a kv head over `group`, neurons and vocabulary over both. Two
axes rather than one, because a model has few kv heads: where there are more devices than those, each kv head is held by
a group of devices that share out its queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from qwen2_jax.config import DecoderConfig

DATA_AXIS, KV_AXIS, GROUP_AXIS = "data", "kv", "group"

MeshAxes = tuple[str, ...]


@dataclass(frozen=True)
class ModelSplit:
    """The mesh axes over which each logical axis of the parameters is split; () where every device holds all of it.

    What does not divide is not split: attention is then computed by several devices alike.
    """

    heads: MeshAxes = ()
    kv_heads: MeshAxes = ()
    mlp: MeshAxes = ()
    vocab: MeshAxes = ()

    @classmethod
    def of(cls, config: DecoderConfig, mesh: Mesh) -> ModelSplit:
        """The table for one model on one (data, kv, group) mesh."""
        kv, group = mesh.shape[KV_AXIS], mesh.shape[GROUP_AXIS]
        shares_queries = config.n_kv_heads == kv and config.n_heads // config.n_kv_heads % group == 0
        axes = [(KV_AXIS, kv), (GROUP_AXIS, group)]

        def over(candidates: Sequence[tuple[str, int]], size: int) -> MeshAxes:
            split = math.prod(n for _, n in candidates)
            return tuple(axis for axis, n in candidates if n > 1) if size % split == 0 else over(candidates[:-1], size)

        return cls(
            heads=over(axes if shares_queries else axes[:1], config.n_heads),
            kv_heads=over(axes[:1], config.n_kv_heads),
            mlp=over(axes, config.d_ff),
            vocab=over(axes, config.vocab_size),
        )

    def spec(self, axes: Sequence[str]) -> PartitionSpec:
        """Of an array whose dimensions carry these logical names."""
        return PartitionSpec(*(getattr(self, axis, ()) or None for axis in axes))

    def of_site(self, site: str) -> MeshAxes:
        """The mesh axes over which the width of a captured site is split."""
        widths = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads, "attn_heads": self.heads}
        return (widths | {"mlp_act": self.mlp, "logits": self.vocab}).get(site, ())


WHOLE = ModelSplit()


@dataclass(frozen=True)
class ModelMesh:
    """The devices a model runs on, and how it lies on them."""

    mesh: Mesh
    split: ModelSplit

    @classmethod
    def of(cls, config: DecoderConfig, devices: Sequence[jax.Device], model_parallel: int = 1) -> ModelMesh:
        """All `devices`, with the model split over `model_parallel` of them at a time, which must divide them."""
        kv = math.gcd(config.n_kv_heads, model_parallel)
        shape = (len(devices) // model_parallel, kv, model_parallel // kv)
        mesh = Mesh(np.array(devices).reshape(shape), (DATA_AXIS, KV_AXIS, GROUP_AXIS))
        return cls(mesh, ModelSplit.of(config, mesh))

    def sharding(self, axes: Sequence[str]) -> NamedSharding:
        """Of a parameter whose dimensions carry these logical names."""
        return NamedSharding(self.mesh, self.split.spec(axes))

    def parameter_specs(self, state: nnx.State) -> nnx.State:
        """How each parameter lies on the mesh, by the logical axes that are beside it."""
        return jax.tree.map(self.split.spec, nnx.get_partition_spec(state))

    @property
    def rows(self) -> PartitionSpec:
        """Of (B, T) arrays of tokens."""
        return PartitionSpec(DATA_AXIS)

    def output_spec(self, name: str) -> PartitionSpec:
        """Of what `Decoder.forward` gives under this name: (L, B, T, W) of a site, (B, T, V) of "logits"."""
        over = self.split.of_site(name) or None
        return PartitionSpec(*([] if name == "logits" else [None]), DATA_AXIS, None, over)


def sum_over(x: Float[Array, "..."], axes: MeshAxes) -> Float[Array, "..."]:
    """The sum of every device's part, inside `jax.shard_map`."""
    return jax.lax.psum(x, axes) if axes else x


def rows_of(table: Float[Array, "V D"], index: Int[Array, "B T"], axes: MeshAxes) -> Float[Array, "B T D"]:
    """table[index] where each device holds a part of the rows: it gives what it has, and zeros are added to that."""
    if not axes:
        return table[index]
    index = index - jax.lax.axis_index(axes) * len(table)
    is_here = (index >= 0) & (index < len(table))
    found = table[jnp.where(is_here, index, 0)]
    return jax.lax.psum(jnp.where(is_here[..., None], found, 0), axes)
