"""Compiles the extraction step for a GPU without having one, and reports the memory it takes.

Needs the GPU's compiler, but no GPU, weights or hub: see `make test-gpu` and README.md.
"""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
from absl.flags import argparse_flags
from jax.experimental import topologies

from benchmarks.common.measuring import table
from benchmarks.common.shapes import Case, shape_of
from benchmarks.gpu.benchmark import CASES
from core.base.command_line import CommandParser, positive, run_command
from core.base.errors import UsageError
from core.jax_utils import COMPUTE_DTYPES, step_program
from core.step.backend import StepRequest
from qwen2_jax import Capture, Decoder
from qwen2_jax.checkpoints.weights import cut_config
from qwen2_jax.sharding import ModelMesh

_PLUGINS = "jax_cuda12_plugin", "jax_cuda13_plugin"
_DTYPE = "bfloat16"
# XLA's description of a device, with the fields that compilation needs.
_DEVICE = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared} shared_memory_per_core: {shared}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 1536 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 1000000000000 l2_cache_size: 40000000 clock_rate_ghz: 1.5 device_memory_size: 80000000000
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {name}"
"""


@dataclass(frozen=True)
class Gpu:
    """Compute capability, bytes of shared memory that a block may request, and processors (CUDA programming guide)."""

    major: int
    minor: int
    shared: int
    cores: int


GPUS = {
    "H200": Gpu(9, 0, 232448, 132),
    "B200": Gpu(10, 0, 232448, 148),
    "A100": Gpu(8, 0, 166912, 108),
    "L4": Gpu(8, 9, 101376, 58),
}


@dataclass(frozen=True)
class Memory:
    """Bytes of a step: arguments, outputs and temporaries.

    Attributes:
      logits: bytes of all attention logits of one layer at once.
    """

    case: str
    arguments: int
    outputs: int
    temporary: int
    logits: int


def has_compiler() -> bool:
    """Whether JAX's plugin for CUDA, which holds the compiler, is installed."""
    return any(importlib.util.find_spec(name) is not None for name in _PLUGINS)


def gpu_device(name: str) -> jax.Device:
    """The compiler's device for one of GPUS. Needs the compiler."""
    config = _DEVICE.format(name=name, **asdict(GPUS[name]))
    description = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=config)
    return description.devices[0]


def step_memory(case: Case, name: str, tokens: int) -> Memory:
    """The memory of a step of `tokens` tokens on one GPU; residuals, computed and stored in bfloat16."""
    config = shape_of(case.model)
    capture, mesh = Capture(case.layers_of(config)), ModelMesh.of(config, [gpu_device(name)], 1)
    cut = cut_config(config, capture.layers_run(config.n_layers))
    shapes = Decoder.abstract(cut, COMPUTE_DTYPES[_DTYPE], mesh=mesh, with_final_norm=False, with_head=False)
    program = step_program(shapes, StepRequest(capture, _DTYPE, _DTYPE), mesh)
    rows = tokens // case.length
    ids = jax.ShapeDtypeStruct((rows, case.length), jnp.int32, sharding=program.rows)
    memory = program.forward.lower(program.state, ids, ids, ids).compile().memory_analysis()
    assert memory is not None  # an executable of another kind may lack it
    logits = 4 * rows * config.n_heads * case.length**2
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    return Memory(case.name, *sizes, logits)


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--gpu", choices=tuple(GPUS), default="H200", help="GPU to compile for (default H200)")
    add("--tokens", type=positive(int), default=16384, help="tokens per step, a multiple of 2048 (default 16384)")
    add("--json", action="store_true", help="print one JSON object on stdout instead of the table")
    add("--verbose", action="store_true", help="stack traces of errors")
    return parser


def report(results: Sequence[Memory]) -> str:
    """The printed table."""
    header = ["case", "weights", "outputs", "temporary", "logits of one layer"]
    sizes = [(found.arguments, found.outputs, found.temporary, found.logits) for found in results]
    rows = [[found.case, *(f"{size / 1e9:.2f} GB" for size in row)] for found, row in zip(results, sizes, strict=True)]
    return table(header, rows)


def run(args: argparse.Namespace) -> None:
    """Compiles the cases one after another and prints their memory."""
    if args.tokens < 1 or args.tokens % max(case.length for case in CASES):
        raise UsageError(f"--tokens {args.tokens}: must be a multiple of 2048")
    if not has_compiler():
        raise UsageError("the GPU's compiler is not installed: make build/gpu_compiler/.installed, see README.md")
    results = [step_memory(case, args.gpu, args.tokens) for case in CASES]
    print(json.dumps([asdict(result) for result in results]) if args.json else report(results))


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
