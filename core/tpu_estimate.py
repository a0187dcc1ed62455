"""The TPU laboratory: compiles the real extraction step for a TPU that is not there, and estimates its cost.

The compiler is libtpu's; its own estimate of each operation's cycles is summed over the program (`core.hlo_cost`). What
the estimate counts, and what it cannot know, is written down in docs/tpu_laboratory.md.
"""

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental import topologies

from core.backend import StepRequest
from core.batching import default_row_lengths
from core.capture import resolve_capture
from core.device_mesh import device_share, model_parallelism
from core.errors import RunError, UsageError
from core.hlo_cost import Collective, Program, ProgramCost
from core.jax_utils import COMPUTE_DTYPES, step_program
from core.model_flops import model_flops, windows_run
from core.model_shape import check_sample_length
from core.run_config import RunConfig
from core.tpu_chips import CHIPS, Chip
from qwen2_jax import Decoder, DecoderConfig, load_config
from qwen2_jax.sharding import DATA_AXIS, ModelMesh
from qwen2_jax.tpu_attention import block_of
from qwen2_jax.weights import cut_config

_TOPOLOGY = re.compile(r"(v\d+\w?):\d+x\d+(x\d+)?")
# "Used 20.0G of 15.75G hbm" and "temporaries (28.68G) exceeds available HBM (15.75G)".
_OUT_OF_MEMORY = re.compile(r"([\d.]+[KMGT])\)?(?: of | exceeds available HBM \()([\d.]+[KMGT])")
# Shares of the matrix units' peak at which kernels are taken to run, until one is measured on a chip.
KERNEL_SHARE, NARROW_KERNEL_SHARE, NARROW_HEAD = 0.6, 0.4, 128
_LISTED = 12
TOKENS_PRICED = 1e9


@dataclass(frozen=True)
class StepEstimate:
    """One step of one chip. Seconds are estimates; bytes are the compiler's.

    Attributes:
      rows, length: of a chip, or of the chips that hold the model together.
      tokens_per_chip: tokens of a step over the chips that compute them.
      operations: by name, the seconds of all operations that the compiler prices, longest first.
      kernel_flops: what the attention kernels compute, masked parts of visited blocks included.
      unpriced_seconds: operations without an estimate, as their bytes take in HBM; unpriced: the bytes they write.
      collective_seconds: as their bytes take on the links between chips.
      copied_bytes: copies in the background, not part of the step's time.
      model_flops: 2 x parameters used x tokens, and causal attention inside samples as long as a row.
    """

    topology: str
    chips: int
    model_parallel: int
    rows: int
    length: int
    tokens_per_chip: float
    hbm_bytes: int
    hbm_capacity: int
    operations: dict[str, float]
    kernels: int
    kernel_flops: float
    kernel_share: float
    kernel_seconds: float
    unpriced: dict[str, int]
    unpriced_seconds: float
    collectives: tuple[Collective, ...]
    collective_seconds: float
    copied_bytes: int
    copied_seconds: float
    model_flops: float
    output_bytes: int
    chip: Chip = field(repr=False)

    @property
    def exit_code(self) -> int:
        """0: what cannot be compiled raises instead."""
        return 0

    @property
    def step_seconds(self) -> float:
        """Everything one after the other but the copies in the background."""
        operations = sum(self.operations.values())
        return operations + self.kernel_seconds + self.unpriced_seconds + self.collective_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the matrix units could do in that time."""
        return self.model_flops / self.chip.peak / self.step_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of one chip."""
        return self.tokens_per_chip / self.step_seconds

    @property
    def output_rate(self) -> float:
        """Bytes a second that leave a chip when nothing holds it back."""
        return self.output_bytes / self.step_seconds

    @property
    def link_share(self) -> float:
        """What the outputs need of the link between chip and host; above 1 the link sets the pace."""
        return self.output_rate / self.chip.host_link

    @property
    def network_share(self) -> float:
        """What the outputs of a host, uncompressed, need of its network card; above 1 it sets the pace of uploads."""
        return self.output_rate * self.chip.chips_per_host / self.chip.network

    @property
    def dollars(self) -> float:
        """For 10^9 tokens at the chip's pace."""
        return TOKENS_PRICED / self.tokens_per_second / 3600 * self.chip.dollars_per_hour

    def to_json(self) -> dict[str, Any]:
        """For one chip."""
        return {
            "estimated_mfu": round(self.mfu, 4),
            "estimated_step_seconds": self.step_seconds,
            "tokens_per_second_per_chip": round(self.tokens_per_second, 1),
            "output_bytes_per_second_per_chip": round(self.output_rate),
            "output_bytes_per_second_per_host": round(self.output_rate * self.chip.chips_per_host),
            "host_link_share": round(self.link_share, 4),
            "network_share": round(self.network_share, 4),
            "dollars_per_billion_tokens": round(self.dollars, 2),
        } | asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        chip, seconds = self.chip, self.step_seconds
        operations = list(self.operations.items())
        listed = [f"  {1e3 * spent:9.3f} ms  {name}" for name, spent in operations[:_LISTED]]
        rest = sum(spent for _, spent in operations[_LISTED:])
        exchanged = [f"{c.times} {c.operation} of {_gb(c.bytes)} in all" for c in self.collectives]
        return [
            f"{self.topology}: {self.chips} chips, a copy of the model on {self.model_parallel}; "
            f"a step is {self.rows} rows of {self.length} tokens for each copy",
            f"memory           {_gb(self.hbm_bytes)} of {_gb(self.hbm_capacity)} of a chip",
            f"estimated step   {1e3 * seconds:.2f} ms, MFU {self.mfu:.3f}; of it",
            *listed,
            f"  {1e3 * rest:9.3f} ms  {max(0, len(operations) - _LISTED)} other operations",
            f"  {1e3 * self.kernel_seconds:9.3f} ms  {self.kernels} attention kernels, which the compiler does not "
            f"price: {self.kernel_flops / 1e12:.3f} TFLOP of visited blocks at {self.kernel_share} of peak",
            f"  {1e3 * self.unpriced_seconds:9.3f} ms  {len(self.unpriced)} other operations without a price: their "
            "bytes at the speed of HBM",
            f"  {1e3 * self.collective_seconds:9.3f} ms  collectives: {', '.join(exchanged) or 'none'}",
            f"copies beside it {_gb(self.copied_bytes)}, {1e3 * self.copied_seconds:.2f} ms at the speed of HBM",
            f"tokens/s         {self.tokens_per_second:.0f} a chip",
            f"output           {_gb(self.output_rate)}/s a chip: {self.link_share:.0%} of its host link; "
            f"{_gb(self.output_rate * chip.chips_per_host)}/s a host: {self.network_share:.0%} of its network",
            f"price            ${self.dollars:.2f} for 10^9 tokens at ${chip.dollars_per_hour:.2f} a chip and hour",
        ]


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


@dataclass(frozen=True)
class _StepShape:
    topology: str
    chip: Chip
    rows: int
    length: int


def tpu_devices(topology: str) -> list[jax.Device]:
    """The devices of a topology such as `v5e:8x8`, host by host, as the compiler describes them.

    Raises UsageError for a topology that does not exist, and where libtpu is not installed.
    """
    generation = topology.partition(":")[0]
    known = ", ".join(CHIPS)
    if not _TOPOLOGY.fullmatch(topology) or generation not in CHIPS:
        raise UsageError(f"--tpu_topology {topology}: must be a generation ({known}) and its shape, such as v5e:8x8")
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("--tpu_topology needs the TPU compiler, which runs on any Linux: pip install -e '.[lab]'")
    try:
        with _compiler_environment(CHIPS[generation]):
            devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # the runtime's own kinds, which differ by version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"--tpu_topology {topology}: the TPU compiler does not know it ({reason})") from error
    return sorted(devices, key=lambda device: (device.process_index, device.id))


@contextmanager
def _compiler_environment(chip: Chip) -> Iterator[None]:
    """libtpu otherwise asks the machine it runs on for its TPU, lets one process run it at a time, and numbers workers
    in a variable that names this project's workers too. It reads all of them when it is loaded."""
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


def estimate_run(config: RunConfig, topology: str) -> StepEstimate:
    """A full step of a run with these flags, in its longest rows; the model's config is all that is read.

    Raises as `estimate_step` does, and what a run raises for flags that do not fit the model.
    """
    if config.dataset_path or config.sharded_dataset_dir:
        logging.info("--tpu_topology: a step is estimated; the dataset is not read")
    model = load_config(config.model_path, config.revision)
    capture = resolve_capture(config.activation_type, config.layers_to_extract, model, config.model_path)
    check_sample_length(config.max_seq_length, model, config.model_path)
    compute_dtype = "bfloat16" if config.compute_dtype == "auto" else config.compute_dtype
    request = StepRequest(capture, config.dtype, compute_dtype)
    length = default_row_lengths(config.max_seq_length)[-1]
    return estimate_step(model, request, topology, rows=config.batch_size, length=length, layout=config.mesh)


def estimate_step(
    config: DecoderConfig, request: StepRequest, topology: str, *, rows: int, length: int, layout: str = "auto"
) -> StepEstimate:
    """What one step costs on `topology`. rows: of `length` tokens, for each copy of the model. layout: as `--mesh`.

    Raises UsageError for the topology, RunError when the step does not fit into a chip's memory.
    """
    devices = tpu_devices(topology)
    chip = CHIPS[topology.partition(":")[0]]
    per_host = sum(device.process_index == devices[0].process_index for device in devices)

    def share(n: int) -> int:
        return device_share(config, request, ModelMesh.of(config, devices, n))

    mesh = ModelMesh.of(config, devices, model_parallelism(layout, per_host, share, chip.memory))
    compiled = _compile(config, request, mesh, rows * mesh.mesh.shape[DATA_AXIS], length)
    return _estimate(compiled, config, request, mesh, _StepShape(topology, chip, rows, length))


def _compile(
    config: DecoderConfig, request: StepRequest, mesh: ModelMesh, rows: int, length: int
) -> jax.stages.Compiled:
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
    lowered = program.forward.lower(program.state, ids, ids, ids)
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


def _estimate(
    compiled: jax.stages.Compiled, config: DecoderConfig, request: StepRequest, mesh: ModelMesh, step: _StepShape
) -> StepEstimate:
    chip, rows, length = step.chip, step.rows, step.length
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None  # an executable of another kind may lack both
    assert memory is not None
    cost = ProgramCost.of(Program.parse(text))
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    kernel_flops = _visited_flops(config, request, mesh, rows, length) if cost.kernels else 0.0
    kernel_share = KERNEL_SHARE if config.head_dim >= NARROW_HEAD else NARROW_KERNEL_SHARE
    model_parallel = mesh.mesh.size // mesh.mesh.shape[DATA_AXIS]
    return StepEstimate(
        topology=step.topology,
        chips=mesh.mesh.size,
        model_parallel=model_parallel,
        rows=rows,
        length=length,
        tokens_per_chip=rows * length / model_parallel,
        hbm_bytes=held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        hbm_capacity=chip.memory,
        operations={name: cycles / chip.clock for name, cycles in cost.cycles.items()},
        kernels=cost.kernels,
        kernel_flops=kernel_flops,
        kernel_share=kernel_share,
        kernel_seconds=kernel_flops / (kernel_share * chip.peak),
        unpriced=cost.unpriced,
        # What is written was read first.
        unpriced_seconds=2 * sum(cost.unpriced.values()) / chip.memory_speed,
        collectives=cost.collectives,
        collective_seconds=sum(c.bytes for c in cost.collectives) / chip.links_speed,
        copied_bytes=cost.copied_bytes,
        copied_seconds=cost.copied_bytes / chip.memory_speed,
        model_flops=model_flops(config, request.capture, rows, length) / model_parallel,
        output_bytes=memory.output_size_in_bytes,
        chip=chip,
    )


def _visited_flops(config: DecoderConfig, request: StepRequest, mesh: ModelMesh, rows: int, length: int) -> float:
    """What the kernels of a chip compute when a sample fills each row: both products of every block they visit."""
    block = block_of(length)
    heads = config.n_heads // prod(mesh.mesh.shape[axis] for axis in mesh.split.heads)

    def visited(window: int) -> int:
        firsts = (max(0, i * block - window + 1) // block for i in range(length // block))
        return sum(i - first + 1 for i, first in enumerate(firsts))

    blocks = sum(map(visited, windows_run(config, request.capture, length)))
    return 4.0 * rows * blocks * block**2 * heads * config.head_dim
