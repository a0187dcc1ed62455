"""A step whose activations are reduced on the devices that computed them, before anything is copied.

One implementation for every backend: JAX's arrays are reduced where they lie, torch's on the host's CPU by JAX.

Axis letters: L stored layers of a site, B rows of a step, T tokens of a row, U stored rows of a row of the step, W
values of a stored row.
"""

import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Shaped

from core.reduce.arithmetic import ReducedSite, StepRows, reduce_site
from core.reduce.reductions import Reduction, array_name
from core.step import backend
from core.step.fetching import Fetch
from core.step.host_copies import begin_copies
from core.step.layout import StepArrays
from qwen2_jax.sharding import DATA_AXIS

_WHOLE, _ROWS, _LAYERS_ROWS = PartitionSpec(), PartitionSpec(DATA_AXIS), PartitionSpec(None, DATA_AXIS)
# Of the fields of StepRows.
_STEP_ROWS: Any = (_LAYERS_ROWS, _ROWS, _ROWS)


class ReducedStep:
    """A step, and what is done to its activations. dtype: of values that are not quantized."""

    def __init__(self, step: backend.DeviceStep, reduction: Reduction, dtype: np.dtype) -> None:
        self._step = step
        self._reduction, self._dtype = reduction, dtype
        self._programs: dict[frozenset[tuple[str, NamedSharding]], _Program] = {}
        # Programs with collectives have to reach all devices in one order, whichever thread starts them.
        self._order = threading.Lock()

    def __call__(self, arrays: StepArrays) -> "ReducedOutput":
        """Starts one step."""
        with self._order:
            return ReducedOutput(self, self._step(arrays))

    def reduce(self, output: backend.DeviceOutput, fetch: Fetch) -> dict[str, ReducedSite]:
        """Starts to reduce what is fetched of a step, by site, and to copy the outcome."""
        activations, shardings = {}, {}
        for site, x in output.on_device(fetch.gathered).items():
            activations[site], shardings[site] = _on_a_mesh(x)
        with self._order:
            key = frozenset(shardings.items())
            if key not in self._programs:
                self._programs[key] = _Program(shardings, self._reduction, self._dtype)
            reduced = self._programs[key](activations, fetch)
        return begin_copies(reduced)


class _Program:
    """The reduction of arrays that lie in these ways on a mesh."""

    def __init__(self, shardings: Mapping[str, NamedSharding], reduction: Reduction, dtype: np.dtype) -> None:
        self._mesh = mesh = next(iter(shardings.values())).mesh
        self._reduce = _reduction_of(shardings, reduction, dtype)
        self._matrices = None
        if reduction.projection is not None:
            matrices = (reduction.projection.matrix, reduction.projection.mean)
            self._matrices = jax.device_put(matrices, NamedSharding(mesh, _WHOLE))

    def __call__(self, activations: dict[str, Array], fetch: Fetch) -> dict[str, ReducedSite]:
        """Of one step."""
        places = tuple(NamedSharding(self._mesh, spec) for spec in _STEP_ROWS)
        step = StepRows(*jax.device_put(_rows_of(fetch), places))
        reduced: dict[str, ReducedSite] = self._reduce(activations, step, self._matrices)
        return reduced


def _reduction_of(shardings: Mapping[str, NamedSharding], reduction: Reduction, dtype: np.dtype) -> jax.stages.Wrapped:
    """(activations by site, StepRows, matrices and means of the projection) -> `ReducedSite` by site, jitted.

    Rows are reduced where they are; a width that is split over devices is put together there first.
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
    """What a run compiles to reduce `activations`, (L, B, K, D) with their shardings: for devices that are not there.

    fetch: of any one row of the step; the others are taken to be like it.
    """
    shardings = {site: x.sharding for site, x in activations.items()}
    mesh, n_rows = next(iter(shardings.values())).mesh, next(iter(activations.values())).shape[1]

    def struct(x: np.ndarray, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        shape = list(x.shape)
        if DATA_AXIS in spec:
            shape[tuple(spec).index(DATA_AXIS)] = n_rows
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, spec))

    rows: Any = map(struct, _rows_of(fetch), _STEP_ROWS)  # shapes in place of arrays
    step = StepRows(*rows)
    matrices = None
    if reduction.projection is not None:
        matrices = tuple(struct(x, _WHOLE) for x in (reduction.projection.matrix, reduction.projection.mean))
    return _reduction_of(shardings, reduction, dtype).lower(dict(activations), step, matrices)


class ReducedOutput:
    """What one step gives, reduced. As `core.step.backend.StepOutput`, but for what is said here."""

    def __init__(self, step: ReducedStep, output: backend.DeviceOutput) -> None:
        self._step, self._output = step, output
        self._fetch: Fetch | None = None
        self._reduced: dict[str, ReducedSite] | None = None

    def wait(self) -> None:
        """Blocks until the device is done with the forward pass."""
        self._output.wait()

    def norms(self) -> dict[str, Float32[np.ndarray, "L B T"]]:
        """Of the tokens, before they are reduced."""
        return self._output.norms()

    def start_copy(self, fetch: Fetch) -> None:
        """Begins to reduce what `fetch` names, and to bring it to the host.

        Where a step runs only when it is asked for, as on a CPU, `peaks` or `fetch` do it.
        """
        self._fetch = fetch
        if self._output.is_dispatched:
            self._sites()

    def _sites(self) -> dict[str, ReducedSite]:
        if self._reduced is None:
            assert self._fetch is not None, "start_copy comes first"
            self._reduced = self._step.reduce(self._output, self._fetch)
        return self._reduced

    def peaks(self) -> dict[str, Float32[np.ndarray, "L B U"]]:
        """The largest magnitude in each row before it is coded or cast; infinity for a NaN or infinity behind it."""
        return {site: np.asarray(reduced.peaks) for site, reduced in self._sites().items()}

    def losses(self) -> dict[str, Float32[np.ndarray, "L B 2"]]:
        """By site, see `core.reduce.arithmetic.ReducedSite`."""
        return {site: np.asarray(reduced.losses) for site, reduced in self._sites().items()}

    def fetch(self) -> dict[str, Shaped[np.ndarray, "L B U W"]]:
        """The stored arrays by `core.reduce.reductions.array_name`."""
        return {
            array_name(site, name): np.asarray(array)
            for site, reduced in self._sites().items()
            for name, array in reduced.arrays.items()
        }


StepOutput = backend.StepOutput | ReducedOutput


def start_copy(output: StepOutput, fetch: Fetch) -> None:
    """Begins to bring what `fetch` names to the host."""
    if isinstance(output, ReducedOutput):
        output.start_copy(fetch)
    else:
        output.start_copy(fetch.gathered)


def _on_a_mesh(x: Array | np.ndarray) -> tuple[Array, NamedSharding]:
    """JAX's arrays as they lie; numpy's, which torch gives, on the host's CPU."""
    if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
        return x, x.sharding
    mesh = Mesh(np.array(jax.local_devices(backend="cpu")[:1]), (DATA_AXIS,))
    sharding = NamedSharding(mesh, _LAYERS_ROWS)
    return jax.device_put(x, sharding), sharding


def _axes_of(spec: PartitionSpec, dimension: int) -> tuple[str, ...]:
    axes = spec[dimension] if dimension < len(spec) else None
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _rows_of(fetch: Fetch) -> tuple[np.ndarray, ...]:
    """The fields of StepRows."""
    if fetch.pooling is not None:
        return fetch.pooling.weights, fetch.pooling.slots, fetch.units()
    n_rows = len(fetch.stored)
    return np.zeros((0, n_rows, 0), np.float32), np.zeros((n_rows, 0), np.int32), fetch.units()
