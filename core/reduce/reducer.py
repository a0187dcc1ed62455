"""Reduces the output of a step on its devices, before it is copied to the host.

One implementation for every backend: JAX arrays are reduced on their devices, others on the host's CPU by JAX.

Axis letters: L stored layers of a site, B rows of a step, K fetched tokens of a row, D width of a site.
"""

import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from core.reduce.arithmetic import ReducedSite, StepRows, reduce_site
from core.reduce.reductions import Reduction, array_name
from core.step.backend import StepOutput
from core.step.fetching import Fetch
from core.step.host_copies import begin_copy
from qwen2_jax.sharding import DATA_AXIS

_WHOLE, _ROWS, _LAYERS_ROWS = PartitionSpec(), PartitionSpec(DATA_AXIS), PartitionSpec(None, DATA_AXIS)
# The specs of the fields of StepRows.
_STEP_ROWS: Any = (_LAYERS_ROWS, _ROWS, _ROWS)


class Reducer:
    """The reduction of step outputs. Several threads may call it.

    dtype: the dtype of values that are not quantized.
    """

    def __init__(self, reduction: Reduction, dtype: np.dtype) -> None:
        self._reduction, self._dtype = reduction, dtype
        self._programs: dict[frozenset[tuple[str, NamedSharding]], _Program] = {}
        # Compile each program once.
        self._one_at_a_time = threading.Lock()

    def __call__(self, output: StepOutput, fetch: Fetch) -> StepOutput:
        """Starts to reduce an output of (L, B, K, D) by site, which holds the fetched tokens.

        Non-JAX arrays are copied to the host first, which blocks.
        """
        activations, shardings = {}, {}
        for site, x in output.arrays.items():
            activations[site], shardings[site] = _on_a_mesh(x)
        with self._one_at_a_time:
            key = frozenset(shardings.items())
            if key not in self._programs:
                self._programs[key] = _Program(shardings, self._reduction, self._dtype)
            return _as_output(self._programs[key](activations, StepRows.of(fetch)))


def _as_output(reduced: Mapping[str, ReducedSite]) -> StepOutput:
    arrays = {array_name(site, name): x for site, of in reduced.items() for name, x in of.arrays.items()}
    peaks, losses = ({site: getattr(of, of_rows) for site, of in reduced.items()} for of_rows in ("peaks", "losses"))
    return StepOutput(arrays, peaks, losses=losses)


class _Program:
    """The compiled reduction for one set of shardings."""

    def __init__(self, shardings: Mapping[str, NamedSharding], reduction: Reduction, dtype: np.dtype) -> None:
        self._mesh = mesh = next(iter(shardings.values())).mesh
        self._reduce = _reduction_of(shardings, reduction, dtype)
        self._matrices = None
        if reduction.projection is not None:
            matrices = (reduction.projection.matrix, reduction.projection.mean)
            self._matrices = jax.device_put(matrices, NamedSharding(mesh, _WHOLE))

    def __call__(self, activations: dict[str, Array], rows: StepRows) -> dict[str, ReducedSite]:
        """Starts the reduction of one step's activations; returns its sites by name."""
        places = StepRows(*(NamedSharding(self._mesh, spec) for spec in _STEP_ROWS))  # type: ignore[arg-type]
        reduced: dict[str, ReducedSite] = self._reduce(activations, jax.device_put(rows, places), self._matrices)
        return reduced


def _reduction_of(shardings: Mapping[str, NamedSharding], reduction: Reduction, dtype: np.dtype) -> jax.stages.Wrapped:
    """(activations by site, StepRows, matrices and means of the projection) -> `ReducedSite` by site, jitted.

    Rows are reduced on their devices; a width that is split over devices is gathered there first.
    """
    mesh = next(iter(shardings.values())).mesh
    split = {site: _axes_of(sharding.spec, 3) for site, sharding in shardings.items()}

    def reduce(
        activations: dict[str, Array], step: StepRows, matrices: tuple[Array, Array] | None
    ) -> dict[str, ReducedSite]:
        reduced = {}
        for site, x in activations.items():
            whole = jax.lax.all_gather(x, split[site], axis=3, tiled=True) if split[site] else x
            reduced[site] = reduce_site(whole, step, matrices, reduction, dtype)
        return reduced

    specs = {site: sharding.spec for site, sharding in shardings.items()}
    in_specs = (specs, StepRows(*_STEP_ROWS), _WHOLE)
    return jax.jit(jax.shard_map(reduce, mesh=mesh, in_specs=in_specs, out_specs=_LAYERS_ROWS, check_vma=False))


def lower_reduction(
    activations: Mapping[str, jax.ShapeDtypeStruct], fetch: Fetch, reduction: Reduction, dtype: np.dtype
) -> jax.stages.Lowered:
    """The reduction that a run compiles for `activations`, (L, B, K, D) with shardings; the devices may be absent.

    fetch: of a step with a single row; all rows are assumed to be like it.
    """
    shardings = {site: x.sharding for site, x in activations.items()}
    mesh, n_rows = next(iter(shardings.values())).mesh, next(iter(activations.values())).shape[1]

    def struct(x: Array | np.ndarray, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        shape = list(x.shape)
        if DATA_AXIS in spec:
            shape[tuple(spec).index(DATA_AXIS)] = n_rows
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, spec))

    shapes: Any = map(struct, StepRows.of(fetch), _STEP_ROWS)  # in place of arrays
    matrices = None
    if reduction.projection is not None:
        matrices = tuple(struct(x, _WHOLE) for x in (reduction.projection.matrix, reduction.projection.mean))
    return _reduction_of(shardings, reduction, dtype).lower(dict(activations), StepRows(*shapes), matrices)


def _on_a_mesh(x: Any) -> tuple[Array, NamedSharding]:
    """A JAX array on its own mesh; any other on the host's CPU."""
    if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
        return x, x.sharding
    mesh = Mesh(np.array(jax.local_devices(backend="cpu")[:1]), (DATA_AXIS,))
    sharding = NamedSharding(mesh, _LAYERS_ROWS)
    return jax.device_put(np.asarray(begin_copy(x)), sharding), sharding


def _axes_of(spec: PartitionSpec, dimension: int) -> tuple[str, ...]:
    axes = spec[dimension] if dimension < len(spec) else None
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
