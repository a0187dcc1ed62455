"""How the devices of a process share the work: how many of them hold one copy of the model together."""

from collections.abc import Callable, Sequence
from math import prod

import jax
import jax.numpy as jnp

from core.base.errors import RunError, UsageError
from core.step.backend import StepRequest
from core.step.mesh_flag import EXPLICIT_MESH
from qwen2_jax import DecoderConfig
from qwen2_jax.checkpoints.weights import cut_config
from qwen2_jax.parameters import parameter_specs
from qwen2_jax.sharding import ModelMesh

# The rest of a device's memory is for activations and what the compiler needs.
_SHARE_FOR_WEIGHTS = 0.6


def device_share(config: DecoderConfig, request: StepRequest, mesh: ModelMesh) -> int:
    """Bytes of the parameters that each device of `mesh` holds for a step, in its compute dtype."""
    capture = request.capture
    specs = parameter_specs(
        cut_config(config, max(1, capture.layers_run(config.n_layers))),
        with_final_norm=capture.needs_final_norm,
        with_head=capture.logits,
    )
    shares = (mesh.sharding(spec.axes).shard_shape(spec.shape) for spec in specs.values())
    return sum(map(prod, shares)) * jnp.dtype(request.compute_dtype).itemsize


def device_bytes() -> int | None:
    """The memory of one device; None where the device is the host."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def model_parallelism(layout: str, n_devices: int, share: Callable[[int], int], available: int | None) -> int:
    """Over how many devices each copy of the model is split.

    layout: 1d, every device has all of it; 2d, one copy over all devices; DATAxMODEL, as it says; auto, as few devices
    as have room for the parameters.
    share: over how many devices -> the bytes that each then holds, of the `available` that it has (None: not known).
    The share need not fall with the number: heads and neurons that do not divide are held by every device.
    Raises UsageError when the layout is not one of these devices, RunError when the model does not fit.
    """
    if explicit := EXPLICIT_MESH.fullmatch(layout):
        data, model = int(explicit[1]), int(explicit[2])
        if data * model != n_devices:
            raise UsageError(f"--mesh {layout}: this host has {n_devices} devices, not {data * model}")
        return model
    if layout != "auto":
        return 1 if layout == "1d" else n_devices
    if available is None:
        return 1
    return _fewest(_divisors(n_devices), share, available)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _fewest(choices: Sequence[int], share: Callable[[int], int], available: int) -> int:
    shares = {n: share(n) for n in choices}
    for n, held in shares.items():
        if held <= _SHARE_FOR_WEIGHTS * available:
            return n
    raise RunError(
        f"the model's weights take {shares[1] / 1e9:.1f} GB, split over this host's {choices[-1]} devices at least "
        f"{min(shares.values()) / 1e9:.1f} GB of the {available / 1e9:.1f} GB of each: capture lower layers, or use "
        "larger devices (or --mesh 2d, to try)"
    )
