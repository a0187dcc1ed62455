"""The TPU laboratory: compiles the real extraction step for a TPU without having one, and estimates its cost.

The compiler is libtpu's (`tpu_programs`); its own estimate of each operation's cycles is summed over the program
(`hlo_cost`). docs/tpu_laboratory.md describes what the estimate includes, and what it cannot.
"""

from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from core.base.dtypes import DTYPES
from core.pricing.hlo_cost import Collective, Program, ProgramCost
from core.pricing.model_flops import model_flops, windows_run
from core.pricing.tpu_chips import CHIPS, Chip, links_inside
from core.pricing.tpu_programs import StepPrograms, compile_step, tpu_devices
from core.reduce.reductions import Reduction
from core.run.checks import checked_reduction, checked_selection
from core.run.config import RunConfig
from core.run.job import step_request
from core.run.progress import format_bytes
from core.step.backend import StepRequest
from core.step.capture import resolve_capture
from core.step.device_mesh import device_share, model_parallelism
from core.step.layout import default_row_lengths
from core.step.model_shape import check_sample_length
from qwen2_jax import DecoderConfig, load_config
from qwen2_jax.attention.tpu import block_of
from qwen2_jax.sharding import DATA_AXIS, ModelMesh

# Assumed shares of the matrix units' peak for kernels, until one is measured on a chip.
KERNEL_SHARE, NARROW_KERNEL_SHARE, NARROW_HEAD = 0.6, 0.4, 128
_LISTED = 12
TOKENS_PRICED = 1e9


@dataclass(frozen=True)
class StepEstimate:
    """One step on one chip. Seconds are estimates; bytes are the compiler's, output bytes are computed from shapes.

    Attributes:
      rows, length: of a chip, or of the chips that hold one copy of the model.
      tokens_per_chip: tokens of a step over the chips that compute them.
      operations: by name, the seconds of all operations with a compiler estimate, longest first.
      kernel_flops: computed by the attention kernels, including masked parts of visited blocks.
      unpriced_seconds: of operations without an estimate, from their bytes and HBM bandwidth; unpriced: bytes written.
      collective_seconds: from their bytes and the links inside their groups, one after the other.
      copied_bytes: of overlapped copies, which are not part of the step's time.
      reduction: how stored tokens are reduced; None: not at all.
      output_bytes: bytes per step from a chip to its host; output_bytes_whole: the same without the reduction.
      not_counted: flags that leave tokens out; the estimate assumes that all tokens are stored.
      model_flops: 2 × parameters used × tokens, plus causal attention in samples as long as a row.
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
    reduction: str | None
    output_bytes: int
    output_bytes_whole: int
    not_counted: tuple[str, ...]
    chip: Chip = field(repr=False)

    @property
    def exit_code(self) -> int:
        """Always 0: a step that cannot be compiled raises."""
        return 0

    @property
    def step_seconds(self) -> float:
        """The sum of all parts except overlapped copies."""
        operations = sum(self.operations.values())
        return operations + self.kernel_seconds + self.unpriced_seconds + self.collective_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over the matrix units' peak in the time of a step."""
        return self.model_flops / self.chip.peak / self.step_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of one chip."""
        return self.tokens_per_chip / self.step_seconds

    @property
    def chips_of_host(self) -> int:
        """Chips of the slice on one host."""
        return min(self.chips, self.chip.chips_per_host)

    @property
    def output_rate(self) -> float:
        """Output bytes per second of a chip at the estimated step time; replicated values are counted once."""
        return self.output_bytes / self.step_seconds

    @property
    def link_share(self) -> float:
        """Share of the link between chip and host that the outputs need; above 1 the link is the bottleneck."""
        return self.output_rate / self.chip.host_link

    @property
    def network_share(self) -> float:
        """Share of a host's network card that its uncompressed outputs need; above 1 uploads are the bottleneck."""
        return self.output_rate * self.chips_of_host / self.chip.network

    @property
    def dollars(self) -> float:
        """Price of 10^9 tokens at the estimated tokens per second."""
        return TOKENS_PRICED / self.tokens_per_second / 3600 * self.chip.dollars_per_hour

    def to_json(self) -> dict[str, Any]:
        """The estimate for one chip, as plain values."""
        return {
            "estimated_mfu": round(self.mfu, 4),
            "estimated_step_seconds": self.step_seconds,
            "tokens_per_second_per_chip": round(self.tokens_per_second, 1),
            "output_bytes_per_second_per_chip": round(self.output_rate),
            "output_bytes_per_second_per_host": round(self.output_rate * self.chips_of_host),
            "host_link_share": round(self.link_share, 4),
            "network_share": round(self.network_share, 4),
            "dollars_per_billion_tokens": round(self.dollars, 2),
        } | asdict(self)

    def lines(self) -> list[str]:
        """The estimate as lines of text."""
        chip, seconds = self.chip, self.step_seconds
        operations = list(self.operations.items())
        listed = [f"  {1e3 * spent:9.3f} ms  {name}" for name, spent in operations[:_LISTED]]
        rest = sum(spent for _, spent in operations[_LISTED:])
        exchanged = [
            f"{c.times} {c.operation} of {_gb(c.bytes)} in all over {len(c.group) or self.chips}"
            for c in self.collectives
        ]
        reduced = [
            f"reduction        {self.reduction}",
            f"device to host   {format_bytes(self.output_bytes)} of a chip and step, not "
            f"{format_bytes(self.output_bytes_whole)}",
        ]
        left_out = ", ".join(self.not_counted)
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
            *(reduced if self.reduction else ()),
            *(
                [f"not counted      {left_out}: the data decides; all tokens are taken to be stored"]
                if left_out
                else ()
            ),
            f"output           {_gb(self.output_rate)}/s a chip: {self.link_share:.0%} of its host link; "
            f"{_gb(self.output_rate * self.chips_of_host)}/s a host: {self.network_share:.0%} of its network",
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


def estimate_run(config: RunConfig, topology: str) -> StepEstimate:
    """Estimates a full step of a run with these flags, with its longest rows; reads only the model's config.

    Raises as `estimate_step` does, and as a run does for flags that do not fit the model.
    """
    if config.dataset_path or config.sharded_dataset_dir:
        logging.info("--tpu_topology: only a step is estimated; the dataset is not read")
    model = load_config(config.model_path, config.revision)
    capture = resolve_capture(config.activation_type, config.layers_to_extract, model, config.model_path)
    check_sample_length(config.max_seq_length, model, config.model_path)
    compute_dtype = "bfloat16" if config.compute_dtype == "auto" else config.compute_dtype
    selection, reduction = checked_selection(config, capture), checked_reduction(config, capture, model)
    found = estimate_step(
        model,
        step_request(config, capture, compute_dtype, selection, reduction),
        topology,
        rows=config.batch_size,
        length=default_row_lengths(config.max_seq_length)[-1],
        mesh_shape=config.mesh,
        reduction=reduction,
        dtype=config.dtype,
    )
    return replace(found, not_counted=tuple(f"--{name}" for name in config.selection_flags))


def estimate_step(
    config: DecoderConfig,
    request: StepRequest,
    topology: str,
    *,
    rows: int,
    length: int,
    mesh_shape: str = "auto",
    reduction: Reduction | None = None,
    dtype: str | None = None,
) -> StepEstimate:
    """Estimates one step on `topology`. rows: of `length` tokens, for each copy of the model. mesh_shape: as `--mesh`.

    dtype: of stored values that are not quantized; None: that of the request.
    Raises UsageError for the topology, RunError when the step does not fit into a chip's memory.
    """
    devices = tpu_devices(topology)
    chip = CHIPS[topology.partition(":")[0]]
    per_host = sum(device.process_index == devices[0].process_index for device in devices)

    def share(n: int) -> int:
        return device_share(config, request, ModelMesh.of(config, devices, n))

    mesh = ModelMesh.of(config, devices, model_parallelism(mesh_shape, per_host, share, chip.memory))
    stored = DTYPES[dtype or request.stored_dtype]
    programs = compile_step(config, request, mesh, rows * mesh.mesh.shape[DATA_AXIS], length, reduction, stored)
    found = _estimate(programs, config, request, mesh, _StepShape(topology, chip, rows, length))
    return replace(found, reduction=None if reduction is None else str(reduction))


def _estimate(
    programs: StepPrograms, config: DecoderConfig, request: StepRequest, mesh: ModelMesh, step: _StepShape
) -> StepEstimate:
    chip, rows, length = step.chip, step.rows, step.length
    cost = _cost(programs.forward)
    for part in programs.after:
        cost = cost.then(_cost(part), "reduction")
    # The weights stay in memory during the reduction.
    weights = _memory(programs.forward).argument_size_in_bytes
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
        hbm_bytes=max(_peak_bytes(programs.forward), *(weights + _peak_bytes(part) for part in programs.after), 0),
        hbm_capacity=chip.memory,
        operations={name: cycles / chip.clock for name, cycles in cost.cycles.items()},
        kernels=cost.kernels,
        kernel_flops=kernel_flops,
        kernel_share=kernel_share,
        kernel_seconds=kernel_flops / (kernel_share * chip.peak),
        unpriced=cost.unpriced,
        # As many bytes are read as written.
        unpriced_seconds=2 * sum(cost.unpriced.values()) / chip.memory_speed,
        collectives=cost.collectives,
        collective_seconds=sum(_seconds(c, mesh.mesh, chip) for c in cost.collectives),
        copied_bytes=cost.copied_bytes,
        copied_seconds=cost.copied_bytes / chip.memory_speed,
        model_flops=model_flops(config, request.capture, rows, length) / model_parallel,
        reduction=None,
        output_bytes=programs.output_bytes // mesh.mesh.size,
        output_bytes_whole=programs.output_bytes_whole // mesh.mesh.size,
        not_counted=(),
        chip=chip,
    )


def _seconds(collective: Collective, mesh: Mesh, chip: Chip) -> float:
    devices = list(mesh.devices.flat)
    group = [devices[place].coords for place in collective.group or range(len(devices))]
    return collective.sent(len(group)) / (links_inside(group) * chip.link_speed)


def _cost(compiled: jax.stages.Compiled) -> ProgramCost:
    text = compiled.as_text()
    assert text is not None  # other kinds of executables may have no text, and no memory analysis
    return ProgramCost.of(Program.parse(text))


def _memory(compiled: jax.stages.Compiled) -> Any:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory


def _peak_bytes(compiled: jax.stages.Compiled) -> int:
    memory = _memory(compiled)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)


def _visited_flops(config: DecoderConfig, request: StepRequest, mesh: ModelMesh, rows: int, length: int) -> float:
    """FLOPs of a chip's attention kernels when one sample fills each row: both products of every visited block."""
    block = block_of(length)
    heads = config.n_heads // prod(mesh.mesh.shape[axis] for axis in mesh.split.heads)

    def visited(window: int) -> int:
        firsts = (max(0, i * block - window + 1) // block for i in range(length // block))
        return sum(i - first + 1 for i, first in enumerate(firsts))

    blocks = sum(map(visited, windows_run(config, request.capture, length)))
    return 4.0 * rows * blocks * block**2 * heads * config.head_dim
