"""The device side: runtime set-up, the data-parallel mesh and the compiled extraction step.

Axis letters: L stored layers of a site, B rows, T tokens of a row, D width of the site.
"""

import hashlib
import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from core.base.errors import ModelError, UnsupportedError, UsageError
from core.step.backend import StepOutput, StepRequest
from core.step.device_mesh import device_bytes, device_share, model_parallelism
from core.step.layout import StepArrays
from core.step.model_shape import ModelShape
from qwen2_jax import Decoder, DecoderConfig, load_config, load_model
from qwen2_jax.checkpoints.loading import model_digest
from qwen2_jax.checkpoints.weights import cut_config
from qwen2_jax.sharding import DATA_AXIS, MeshAxes, ModelMesh, sum_over
from qwen2_jax.taps import Capture

# Steps that a CPU computes at once: one fills the cores while another waits for its slowest thread.
_CPU_LANES = 2
_INFINITY_BITS = np.float32(np.inf).view(np.int32)
COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def resolve_compute_dtype(name: str) -> str:
    """`auto` is bfloat16 on devices with matrix units and float32 on the CPU, where either may be the faster."""
    if name not in ("auto", *COMPUTE_DTYPES):
        raise UsageError(f"--compute_dtype {name}: must be one of auto, {', '.join(COMPUTE_DTYPES)}")
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def enable_compilation_cache(directory: str) -> None:
    """Keeps compiled programs in `directory`, so that a restart does not compile again.

    CPU programs are kept apart by processor: code compiled for another one may not run here.
    """
    path = Path(directory).expanduser()
    if jax.default_backend() == "cpu":
        path /= "cpu-" + _processor_id()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _processor_id() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    traits = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return hashlib.sha256("".join(sorted(traits)).encode() + platform.machine().encode()).hexdigest()[:12]


def _report_split(mesh: ModelMesh, share: int) -> None:
    """Logs the number of devices that a copy of the model is split over, and the bytes on each."""
    shape = mesh.mesh.shape
    n_devices = mesh.mesh.size // shape[DATA_AXIS]
    if n_devices > 1:
        split = {"attention": mesh.split.heads, "MLP": mesh.split.mlp}
        whole = " and ".join(part for part, axes in split.items() if not axes)
        alike = (
            f"; {whole} of this model cannot be divided by that number, and every device computes it" if whole else ""
        )
        logging.info("a copy of the model is split over %d devices, %.2f GB on each%s", n_devices, share / 1e9, alike)


class JaxBackend:
    """The decoder of `qwen2_jax` on all devices of this process. Satisfies `core.step.backend.Backend`."""

    name = "jax"
    can_pack = True
    reduces_on_device = True

    def __init__(self, layout: str = "auto", weights_cache_dir: str | None = None) -> None:
        self._layout = layout
        self._weights_cache_dir = weights_cache_dir

    @property
    def has_long_rows(self) -> bool:
        """The attention for CPUs skips what lies outside a sample."""
        return jax.default_backend() == "cpu"

    def lanes(self, model: ModelShape, request: StepRequest) -> int:
        """More than one only on a CPU."""
        return _lanes(self._mesh(model, request).mesh)

    def row_multiple(self, model: ModelShape, request: StepRequest) -> int:
        """The number of devices, or of groups of devices with one copy of the model, that the batch is split over."""
        return self._mesh(model, request).mesh.shape[DATA_AXIS]

    def _mesh(self, model: ModelShape, request: StepRequest) -> ModelMesh:
        assert isinstance(model, DecoderConfig)
        devices = jax.local_devices()

        def share(n: int) -> int:
            return device_share(model, request, ModelMesh.of(model, devices, n))

        return ModelMesh.of(model, devices, model_parallelism(self._layout, len(devices), share, device_bytes()))

    def model_shape(self, path: str, revision: str | None) -> DecoderConfig:
        """The model's config. Raises ModelError for a missing or unsupported model."""
        try:
            return load_config(path, revision)
        except UnsupportedError as error:
            raise ModelError(f"{error}; --backend torch can run what transformers knows") from error

    def model_digest(self, path: str, revision: str | None) -> str:
        """See the protocol."""
        return model_digest(path, revision)

    def compute_dtype(self, name: str) -> str:
        """See the protocol."""
        return resolve_compute_dtype(name)

    def load(self, path: str, revision: str | None, request: StepRequest) -> "ExtractionStep":
        """Loads the layers up to the last one that is captured. Raises ModelError."""
        capture = request.capture
        config = load_config(path, revision)
        mesh = self._mesh(config, request)
        _report_split(mesh, device_share(config, request, mesh))
        dtype = COMPUTE_DTYPES[request.compute_dtype]
        # Loaders need at least one layer, although the embedding alone needs none.
        n_layers = max(1, capture.layers_run(config.n_layers))
        parts = {"with_final_norm": capture.needs_final_norm, "with_head": capture.logits}
        step = ExtractionStep(Decoder.abstract(cut_config(config, n_layers), dtype, mesh=mesh, **parts), request, mesh)
        if request.first_shape is not None:
            step.compile_ahead(*request.first_shape)
        model = load_model(
            path,
            dtype=dtype,
            revision=revision,
            mesh=mesh,
            n_layers=n_layers,
            weights_cache_dir=self._weights_cache_dir,
            **parts,
        )
        step.take_weights(model)
        return step

    def next_tokens(
        self, path: str, revision: str | None, compute_dtype: str, texts: Sequence[Int32[np.ndarray, " _"]]
    ) -> list[Int32[np.ndarray, " _"]]:
        """See the protocol. One text at a time, because the logits of a whole step may not fit."""
        capture = Capture((), (), logits=True)
        mesh = self._mesh(load_config(path, revision), StepRequest(capture, "float32", compute_dtype))
        model = load_model(path, dtype=COMPUTE_DTYPES[compute_dtype], revision=revision, mesh=mesh)
        return _next_tokens(model, texts)


def _next_tokens(model: Decoder, texts: Sequence[Int32[np.ndarray, " _"]]) -> list[Int32[np.ndarray, " _"]]:
    logits: Iterator[Any] = map(model, texts)
    return [np.asarray(jnp.argmax(of_text, axis=-1)) for of_text in logits]


# Compiled steps of live models, by request.
_STEPS: WeakKeyDictionary[Decoder, dict[StepRequest, "ExtractionStep"]] = WeakKeyDictionary()


def _put_on(mesh: ModelMesh, model: Decoder) -> Decoder:
    """The same arrays, on a mesh of their single device."""
    graphdef, state = nnx.split(model)
    placed: Decoder = nnx.merge(graphdef, jax.device_put(state, NamedSharding(mesh.mesh, PartitionSpec())))
    return placed


class LoadedBackend(JaxBackend):
    """A model that is loaded already, with its dtype and on its devices."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self._model = self._key = model

    def _mesh(self, model: ModelShape, request: StepRequest) -> ModelMesh:
        if self._model.mesh is not None:
            return self._model.mesh
        return ModelMesh.of(self._model.config, list(self._model.embedding[...].devices()))

    def model_shape(self, path: str, revision: str | None) -> DecoderConfig:
        """Its config."""
        return self._model.config

    def compute_dtype(self, name: str) -> str:
        """The dtype of its weights. Raises UsageError for another."""
        has = self._model.embedding[...].dtype.name
        if name not in ("auto", has):
            raise UsageError(f"compute_dtype {name}: the model is loaded in {has}: load it in {name}")
        return has

    def load(self, path: str, revision: str | None, request: StepRequest) -> "ExtractionStep":
        """A step with the current weights of the model; it is compiled once per request."""
        mesh = self._mesh(self._model.config, request)
        if self._model.mesh is None:
            self._model = _put_on(mesh, self._model)
        steps = _STEPS.setdefault(self._key, {})
        if request not in steps:
            steps[request] = ExtractionStep(self._model, request, mesh)
        steps[request].take_weights(self._model)
        return steps[request]

    def next_tokens(
        self, path: str, revision: str | None, compute_dtype: str, texts: Sequence[Int32[np.ndarray, " _"]]
    ) -> list[Int32[np.ndarray, " _"]]:
        """By the model that is loaded."""
        return _next_tokens(self._model, texts)


# Activations, peaks and norms by site.
Outputs = tuple[dict[str, Array], dict[str, Array], dict[str, Array]]


def _peaks(x: Float[Array, "B T D"], over: MeshAxes) -> Float[Array, "B T"]:
    """The bits of magnitudes are ordered as they are, with NaN above infinity, so max() propagates NaN."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32).max(axis=-1)
    peaks = jax.lax.bitcast_convert_type(jnp.minimum(bits, _INFINITY_BITS), jnp.float32)
    return jax.lax.pmax(peaks, over) if over else peaks


def _norms(x: Float[Array, "B T D"], over: MeshAxes) -> Float[Array, "B T"]:
    return jnp.sqrt(sum_over(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1), over))


def _lanes(mesh: Mesh) -> int:
    """A CPU runs one step per calling thread. Devices that communicate must run the steps in the same order."""
    return _CPU_LANES if mesh.size == 1 and mesh.devices.flat[0].platform == "cpu" else 1


@dataclass(frozen=True)
class StepProgram:
    """The extraction step before it is compiled, by a run for its devices and by the laboratory for others.

    Attributes:
      state: the model's arrays, or their shapes (`Decoder.abstract` on a mesh), which are enough to lower `forward`.
      forward: (state, tokens, segment_ids, positions) -> `Outputs`, jitted; the arrays are (B, T), sharded as `rows`.
      out_specs: the specs of the outputs: activations by site, all peaks, all norms.
    """

    state: nnx.State
    forward: jax.stages.Wrapped
    rows: NamedSharding
    out_specs: tuple[dict[str, PartitionSpec], PartitionSpec, PartitionSpec]


def step_program(model: Decoder, request: StepRequest, mesh: ModelMesh) -> StepProgram:
    """The forward pass over `mesh`: the batch is split over its data axis, the model as its parameters are."""
    graphdef, state = nnx.split(model)
    dtype, split = jnp.dtype(request.stored_dtype), mesh.split

    def on_tap(site: str, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array | None]:
        over = split.of_site(site)
        return x.astype(dtype), _peaks(x, over), _norms(x, over) if site in request.norm_sites else None

    def forward(state: nnx.State, tokens: Array, segment_ids: Array, positions: Array) -> Outputs:
        model = nnx.merge(graphdef, state)
        outputs = model.forward(tokens, segment_ids, positions, request.capture, split, on_tap)
        stored, peaks, norms = ({site: parts[i] for site, parts in outputs.items()} for i in range(3))
        return stored, peaks, {site: norms[site] for site in request.norm_sites}

    rows, layers_rows = mesh.rows, PartitionSpec(None, DATA_AXIS)
    sites = {site: mesh.output_spec(site) for site in request.capture.sites}
    weights = mesh.parameter_specs(state)
    out_specs = (sites, layers_rows, layers_rows)
    mapped = partial(jax.shard_map, mesh=mesh.mesh, check_vma=False)
    return StepProgram(
        state,
        jax.jit(mapped(forward, in_specs=(weights, rows, rows, rows), out_specs=out_specs)),
        NamedSharding(mesh.mesh, rows),
        out_specs,
    )


class ExtractionStep:
    """The compiled forward pass: token arrays in, activations in the stored dtype out.

    The batch is split over the mesh's data axis. With the whole model on every device each computes its rows alone, and
    the program has no collectives. One compilation for each (rows, row length).

    It can be made of a model with shapes instead of arrays (`Decoder.abstract`), to be compiled while the weights are
    read; then `take_weights` must be called before the first step.

    The hosts of a slice run this one program, each over its own devices and rows. No data crosses hosts: no host
    waits for another, and a host that stops or fails leaves no step half launched on the others.
    """

    def __init__(self, model: Decoder, request: StepRequest, mesh: ModelMesh) -> None:
        self._program = step_program(model, request, mesh)
        self._is_done_on_return = _lanes(mesh.mesh) > 1
        self._ahead: dict[tuple[int, ...], Future[jax.stages.Compiled]] = {}

    def compile_ahead(self, rows: int, length: int) -> None:
        """Starts to compile for steps of this shape, and returns.

        Tracing and lowering hold Python's lock, so they are done here: in a thread they would slow down the reading of
        weights, whose many small array operations would each wait for the lock.
        """
        program = self._program
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=program.rows)
        lowered = program.forward.lower(program.state, tokens, tokens, tokens)
        thread = ThreadPoolExecutor(1, "compile")
        self._ahead[rows, length] = thread.submit(lowered.compile)
        thread.shutdown(wait=False)

    def memory_bytes(self, rows: int, length: int) -> int:
        """By the compiler, the bytes that a step of this shape needs on each device, besides the weights."""
        program = self._program
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=program.rows)
        needed = program.forward.lower(program.state, tokens, tokens, tokens).compile().memory_analysis()
        assert needed is not None, "this compiler tells what it needs"
        return int(needed.temp_size_in_bytes + needed.output_size_in_bytes)

    def take_weights(self, model: Decoder) -> None:
        """Replaces the shapes by the arrays of `model`."""
        self._program = replace(self._program, state=nnx.state(model))

    def __call__(self, arrays: StepArrays) -> StepOutput:
        """Starts one step; returns at once, while the arrays are computing; on a CPU when they are computed."""
        program = self._program
        inputs = jax.device_put((arrays.tokens, arrays.segment_ids, arrays.positions), program.rows)
        ahead = self._ahead.get(arrays.tokens.shape)
        forward = program.forward if ahead is None else ahead.result()
        outputs: Outputs = forward(program.state, *inputs)
        return StepOutput(*(jax.block_until_ready(outputs) if self._is_done_on_return else outputs))
