"""The device side: runtime set-up, the data-parallel mesh and the compiled extraction step.

Axis letters: L captured layers, B rows, T tokens, D width of the site.
"""

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from core.batching import StepArrays
from core.errors import UsageError
from qwen2_jax import Capture, Decoder

DATA_AXIS = "data"
COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def resolve_compute_dtype(name: str) -> str:
    """`auto` is bfloat16 where matrix units want it, and float32 on the CPU, where it is both exact and faster."""
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def data_mesh() -> Mesh:
    """All devices of this process on one data axis."""
    return Mesh(np.array(jax.local_devices()), (DATA_AXIS,))


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


def join_hosts(coordinator_address: str | None, num_hosts: int | None, host_id: int | None) -> tuple[int, int]:
    """How many hosts the pod slice has, and which one this is; what is None is found by JAX on a TPU VM.

    The hosts part again at once: each works on its own, and while they are joined the end of one ends them all.
    Raises UsageError when they do not find each other.
    """
    try:
        jax.distributed.initialize(coordinator_address, num_processes=num_hosts, process_id=host_id)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--multihost: cannot join the other hosts ({reason}): "
            "give --coordinator_address, --num_hosts and --host_id"
        ) from error
    hosts, host = jax.process_count(), jax.process_index()
    jax.distributed.shutdown()
    return hosts, host


@dataclass(frozen=True)
class StepOutput:
    """Device arrays of one step, still being computed when this is handed out.

    Attributes:
      activations: by site, (L, B, T, D) in the stored dtype.
      peaks: by site, (L, B) float32: the largest magnitude before the cast, padding left out; infinity when
        a value is infinite or NaN.
    """

    activations: dict[str, Array]
    peaks: dict[str, Array]

    def copy_to_host_async(self) -> None:
        """Starts the copy to the host as soon as the values are there."""
        for array in (*self.activations.values(), *self.peaks.values()):
            array.copy_to_host_async()


def _peak(x: Float[Array, "L B T D"], is_token: Bool[Array, "1 B T 1"]) -> Float[Array, "L B"]:
    """NaN is made infinite first: XLA's maximum may drop it."""
    magnitude = jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf)
    return jnp.max(jnp.where(is_token, magnitude, 0), axis=(2, 3)).astype(jnp.float32)


class ExtractionStep:
    """The compiled forward pass: token arrays in, activations in the stored dtype out.

    The batch is split over the mesh's data axis with the weights replicated; every device computes its rows alone, so
    the program has no collectives. One compilation for each (rows, row length).
    """

    def __init__(self, model: Decoder, capture: Capture, stored_dtype: str, mesh: Mesh) -> None:
        graphdef, self._state = nnx.split(model)
        self._mesh = mesh
        self._split = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
        dtype = jnp.dtype(stored_dtype)

        def forward(
            state: nnx.State, tokens: Array, segment_ids: Array, positions: Array
        ) -> tuple[dict[str, Array], dict[str, Array]]:
            captured = nnx.merge(graphdef, state)(tokens, segment_ids, positions, capture)
            is_token = (segment_ids > 0)[None, :, :, None]
            peaks = {site: _peak(x, is_token) for site, x in captured.items()}
            return {site: x.astype(dtype) for site, x in captured.items()}, peaks

        rows, layers_rows = PartitionSpec(DATA_AXIS), PartitionSpec(None, DATA_AXIS)
        self._forward = jax.jit(
            jax.shard_map(
                forward, mesh=mesh, in_specs=(PartitionSpec(), rows, rows, rows), out_specs=layers_rows, check_vma=False
            )
        )

    def __call__(self, arrays: StepArrays) -> StepOutput:
        """Starts one step; returns at once with arrays that fill when the device is done."""
        inputs = jax.device_put((arrays.tokens, arrays.segment_ids, arrays.positions), self._split)
        return StepOutput(*self._forward(self._state, *inputs))
