"""From checkpoint tensors to parameters on the devices, a block at a time.

The host never holds a whole tensor, let alone a stack of them: see `placement`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

import jax
import numpy as np

from core.base.errors import ModelError
from qwen2_jax.checkpoints.files import is_remote
from qwen2_jax.checkpoints.placement import Placement, place
from qwen2_jax.checkpoints.weight_source import WeightSource
from qwen2_jax.config import DecoderConfig
from qwen2_jax.families import Family
from qwen2_jax.mapping.weight_table import Rows, Stored, WeightTable
from qwen2_jax.parameters import ParamSpec, parameter_specs
from qwen2_jax.sharding import ModelMesh

_COMPARED_BYTES = 8 << 20


def load_parameters(
    source: WeightSource,
    family: Family,
    config: DecoderConfig,
    *,
    n_layers: int,
    with_final_norm: bool = True,
    with_head: bool = True,
    dtype: np.dtype,
    mesh: ModelMesh | None,
) -> dict[str, jax.Array]:
    """The parameters of the first `n_layers` layers, cast to `dtype` and laid out over the mesh (or on one device).

    config: of the whole model. Only what the devices of this process hold is read.
    Raises `ModelError` for missing, left-over and misshapen tensors, before anything is read.
    """
    table = {name: stored for name, stored in family.weights(config).items() if name in parameter_specs(config)}
    tensors = CheckedTensors(source, family, config, table, head_optional=not with_head)
    cut = cut_config(config, n_layers)
    specs = parameter_specs(cut, with_final_norm=with_final_norm, with_head=with_head)
    placements = {
        name: Placement(
            shape=spec.shape,
            sharding=None if mesh is None else mesh.sharding(spec.axes),
            layers=tensors.layers(table[name], spec),
            stacked=spec.stacked,
        )
        for name, spec in specs.items()
    }
    return place(placements, np.dtype(dtype), from_network=is_remote(source.url))


def cut_config(config: DecoderConfig, n_layers: int) -> DecoderConfig:
    """The config of the model's first layers alone."""
    return dataclasses.replace(config, n_layers=n_layers, windows=config.windows[:n_layers])


@dataclasses.dataclass(frozen=True)
class LayerTensor:
    """One layer of one parameter in a checkpoint: an array (out, in) or (out,), of which any part can be read."""

    source: WeightSource
    name: str
    rows: Rows | None
    transposed: bool

    def read(self, rows: slice, columns: slice | None) -> np.ndarray:
        """Part of the array, in the float type it is stored in."""
        if not self.transposed:
            pieces = [self.source.read(self.name, *part) for part in self._stored(rows)]
            part = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            return part if columns is None else part[:, columns]
        assert columns is not None
        stored = self.source.read(self.name, columns.start, columns.stop)
        pieces = [stored[:, start:stop] for start, stop in self._stored(rows)]
        return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)).T

    def _stored(self, rows: slice) -> list[tuple[int, int]]:
        """Where these rows of the parameter lie in the tensor: ranges, in order."""
        if self.rows is None:
            return [(rows.start, rows.stop)]
        width = self.rows.stop - self.rows.start
        group = self.source.shape(self.name)[1 if self.transposed else 0] // self.rows.groups
        ranges = []
        for index in range(rows.start // width, -(-rows.stop // width)):
            first, last = max(rows.start - index * width, 0), min(rows.stop - index * width, width)
            offset = index * group + self.rows.start
            ranges.append((offset + first, offset + last))
        return ranges


class CheckedTensors:
    """A checkpoint whose tensors are those of a config, under whatever prefix they were saved."""

    def __init__(
        self, source: WeightSource, family: Family, config: DecoderConfig, table: WeightTable, *, head_optional: bool
    ) -> None:
        self._source = source
        shapes = _expected_shapes(table, parameter_specs(config), config.n_layers)
        head = table["lm_head.weight"].name if head_optional and "lm_head.weight" in table else None
        self._names = _stored_names(source, family, config, shapes, optional=head)
        for name, shape in shapes.items():
            if name in self._names and source.shape(self._names[name]) != shape:
                found = source.shape(self._names[name])
                raise ModelError(f"{source.url}: {name} has shape {found} where the config needs {shape}")

    def layers(self, stored: Stored, spec: ParamSpec) -> tuple[LayerTensor, ...]:
        """The tensors of a parameter: one a layer where it is stacked."""
        names = [self._names[name] for name in _tensor_names(stored, spec)]
        return tuple(LayerTensor(self._source, name, stored.rows, stored.transposed) for name in names)


def _tensor_names(stored: Stored, spec: ParamSpec) -> list[str]:
    if not spec.stacked:
        return [stored.name]
    return [stored.name.format(layer=layer) for layer in range(spec.shape[0])]


def _expected_shapes(table: WeightTable, specs: Mapping[str, ParamSpec], n_layers: int) -> dict[str, tuple[int, ...]]:
    """Tensor name -> the shape it must have. A fused tensor has the rows of all its parameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for param, spec in specs.items():
        stored = table[param]
        rows, *columns = spec.shape[1:] if spec.stacked else spec.shape
        for name in _tensor_names(stored, spec):
            before = shapes.get(name, (0, 0))[1 if stored.transposed else 0]
            shapes[name] = (*columns, before + rows) if stored.transposed else (before + rows, *columns)
    return shapes


def _stored_names(
    source: WeightSource,
    family: Family,
    config: DecoderConfig,
    expected: Collection[str],
    optional: str | None,
) -> dict[str, str]:
    """Name in the table -> name in the checkpoint."""
    names = _unprefixed(source, family, expected)
    if missing := sorted(set(expected) - names.keys() - {optional}):
        raise ModelError(f"{source.url}: the checkpoint lacks {_some(missing)}; is it complete and of this family?")
    left_over = [
        name
        for name, stored in names.items()
        if name not in expected and not any(re.search(pattern, stored) for pattern in family.ignored)
    ]
    head = family.weights(config).get("lm_head.weight")
    if config.tie_embeddings and head is not None and left_over == [head.name]:
        _check_tied(source, names[head.name], names[family.weights(config)["embedding"].name])
    elif left_over:
        stored = sorted(names[name] for name in left_over)
        raise ModelError(f"{source.url}: the config has no place for {_some(stored)}; is it the right one?")
    return names


def _unprefixed(source: WeightSource, family: Family, expected: Collection[str]) -> dict[str, str]:
    """Name as the table has it -> name in the checkpoint."""
    renamed = {_renamed(stored, family.prefixes): stored for stored in source.names()}
    if len(renamed) != len(source.names()):
        twice = next(stored for stored in source.names() if renamed[_renamed(stored, family.prefixes)] != stored)
        raise ModelError(f"{source.url}: {_renamed(twice, family.prefixes)} is there twice, once as {twice}")
    if any(name.startswith(family.base) for name in renamed):
        return renamed
    return {name if name in expected else family.base + name: stored for name, stored in renamed.items()}


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for prefix, ours in prefixes.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return name


def _check_tied(source: WeightSource, head: str, embedding: str) -> None:
    """Compares the two a few rows at a time."""
    shape = source.shape(embedding)
    same = source.shape(head) == shape
    rows = max(1, _COMPARED_BYTES // (4 * int(np.prod(shape[1:], dtype=np.int64))))
    for start in range(0, shape[0] if same else 0, rows):
        stop = min(start + rows, shape[0])
        same = same and np.array_equal(source.read(head, start, stop), source.read(embedding, start, stop))
    if not same:
        raise ModelError(f"{source.url}: {head} differs from {embedding} though config.json ties them")


def _some(names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
