"""The programs of a step, compiled by libtpu for TPUs that this machine does not have."""

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding

from core.base.errors import RunError, UsageError
from core.jax_utils import COMPUTE_DTYPES, StepProgram, step_program
from core.pricing.tpu_chips import CHIPS, Chip
from core.reduce.pooling import fetch_rows
from core.reduce.reducer import lower_reduction
from core.reduce.reductions import Pool, Reduction
from core.samples.windows import TokenizedSample
from core.step.backend import StepRequest
from core.step.fetching import Fetch
from core.step.gathering import gather_program
from core.step.layout import StepLayout
from qwen2_jax import Decoder, DecoderConfig
from qwen2_jax.checkpoints.weights import cut_config
from qwen2_jax.sharding import ModelMesh

_TOPOLOGY = re.compile(r"(v\d+\w?):(\d+(?:x\d+){1,2})", re.ASCII)
_ONE_CHIP = {"chips_per_host_bounds": [1, 1, 1]}
# "Used 20.0G of 15.75G hbm" and "temporaries (28.68G) exceeds available HBM (15.75G)".
_OUT_OF_MEMORY = re.compile(r"([\d.]+[KMGT])\)?(?: of | exceeds available HBM \()([\d.]+[KMGT])")


def tpu_devices(topology: str) -> list[jax.Device]:
    """The compiler's devices of a topology such as `v5e:8x8`, host by host.

    Raises UsageError for a topology that does not exist, and where libtpu is not installed.
    """
    found = _TOPOLOGY.fullmatch(topology)
    if found is None or found[1] not in CHIPS:
        known = ", ".join(CHIPS)
        raise UsageError(f"--tpu_topology {topology}: must be a generation ({known}) and its shape, such as v5e:8x8")
    generation, shape = found.groups()
    # The compiler kills the process for some shapes that do not exist, and accepts others.
    if not CHIPS[generation].has_slice(shape):
        raise UsageError(f"--tpu_topology {topology}: slices of {generation} are {CHIPS[generation].known_slices}")
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("--tpu_topology needs the TPU compiler, which runs on any Linux: pip install -e '.[lab]'")
    try:
        with _compiler_environment(CHIPS[generation]):
            bounds = _ONE_CHIP if shape == "1x1" else {}
            devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds).devices
    except Exception as error:  # the exception types differ by version of the runtime
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"--tpu_topology {topology}: the TPU compiler does not know it ({reason})") from error
    return sorted(devices, key=lambda device: (device.process_index, device.id))


@contextmanager
def _compiler_environment(chip: Chip) -> Iterator[None]:
    """Variables that libtpu reads when it is loaded. Without them it queries this machine's TPU metadata, allows one
    process at a time, and reads TPU_WORKER_ID, which may be set for this project's workers."""
    wanted = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": chip.accelerator_type,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@dataclass(frozen=True)
class StepPrograms:
    """The programs that run one after the other in a step on every device.

    Attributes:
      forward: the forward pass.
      after: the programs of a reduction: gathering the tokens that it needs, where they are few, and its arithmetic.
      output_bytes: of all devices together, copied to the host; output_bytes_whole: without the reduction.
    """

    forward: jax.stages.Compiled
    after: tuple[jax.stages.Compiled, ...]
    output_bytes: int
    output_bytes_whole: int


def compile_step(
    config: DecoderConfig,
    request: StepRequest,
    mesh: ModelMesh,
    rows: int,
    length: int,
    reduction: Reduction | None,
    dtype: np.dtype,
) -> StepPrograms:
    """Compiles the programs of a step of `rows` rows over all devices, with one sample in each row.

    dtype: of stored values that are not quantized. Raises RunError when a program does not fit into a chip's memory.
    """
    capture = request.capture
    model = Decoder.abstract(
        cut_config(config, max(1, capture.layers_run(config.n_layers))),
        COMPUTE_DTYPES[request.compute_dtype],
        mesh=mesh,
        with_final_norm=capture.needs_final_norm,
        with_head=capture.logits,
    )
    program = step_program(model, request, mesh)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=program.rows)
    forward = program.forward.lower(program.state, ids, ids, ids)
    compiled = _compile(forward)
    sites, *rest = forward.out_info
    activations = _with_shardings(
        sites, {site: NamedSharding(mesh.mesh, spec) for site, spec in program.out_specs[0].items()}
    )
    whole = sum(prod(x.shape) for x in activations.values()) * dtype.itemsize + _n_bytes(rest)
    if reduction is None:
        return StepPrograms(compiled, (), whole, whole)
    after = _lower_reduction(program, activations, length, reduction, dtype)
    return StepPrograms(compiled, tuple(map(_compile, after)), _n_bytes(after[-1].out_info) + _n_bytes(rest), whole)


def _lower_reduction(
    program: StepProgram,
    activations: dict[str, jax.ShapeDtypeStruct],
    length: int,
    reduction: Reduction,
    dtype: np.dtype,
) -> list[jax.stages.Lowered]:
    fetch, before = _fetch_of_row(length, reduction.pools), []
    if fetch.gathered is not None:
        n_rows = next(iter(activations.values())).shape[1]
        places = jax.ShapeDtypeStruct((n_rows, fetch.gathered.shape[1]), jnp.int32, sharding=program.rows)
        taken = {site: gather_program(x.sharding).lower(x, places) for site, x in activations.items()}
        activations = _with_shardings(
            {site: lowered.out_info for site, lowered in taken.items()},
            {site: x.sharding for site, x in activations.items()},
        )
        before = list(taken.values())
    return [*before, lower_reduction(activations, fetch, reduction, dtype)]


def _with_shardings(
    shapes: Mapping[str, Any], shardings: Mapping[str, NamedSharding]
) -> dict[str, jax.ShapeDtypeStruct]:
    return {site: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[site]) for site, x in shapes.items()}


def _n_bytes(arrays: Any) -> int:
    return sum(prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def _fetch_of_row(length: int, pools: tuple[Pool, ...]) -> Fetch:
    """Of a row that one sample fills."""
    sample = TokenizedSample(0, 0, 1, np.zeros(length, np.int32), length, "", n_pools=len(pools))
    return fetch_rows(StepLayout(length, 1, ((0,),)), [sample], [length], pools)


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = _OUT_OF_MEMORY.search(str(error))
        reason = f"it needs {found[1]}iB of a chip's {found[2]}iB" if found else str(error).splitlines()[0]
        raise RunError(
            f"the step does not fit: {reason}: lower --batch_size, capture fewer layers, or split the model with --mesh"
        ) from error
