"""Where a parameter lives on a mesh: one table from logical axis names to mesh axes."""

from __future__ import annotations

from jax.sharding import Mesh, NamedSharding, PartitionSpec

# All replicated: the batch is what is split. A name maps to a mesh axis once a model needs more than one chip.
RULES: dict[str, str | None] = {
    "layers": None,
    "vocab": None,
    "embed": None,
    "heads": None,
    "kv_heads": None,
    "mlp": None,
}


def parameter_sharding(mesh: Mesh, axes: tuple[str, ...]) -> NamedSharding:
    """The sharding of a parameter whose dimensions carry these logical names."""
    return NamedSharding(mesh, PartitionSpec(*(RULES[axis] for axis in axes)))
