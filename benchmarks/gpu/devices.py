"""Peak rates of GPUs (a table to edit), the check that there is one, and the flags of both benchmarks on a GPU.

Dense bfloat16 TFLOP/s with sums in float32, from NVIDIA's data sheets (nvidia.com/en-us/data-center/h200 and similar
pages; the Ada white paper for GeForce): half of what they print "with sparsity".
"""

import os
from collections.abc import Sequence

import jax
from absl.flags import argparse_flags

from benchmarks.common.cases import add_output_flags
from core.base.command_line import positive
from core.base.errors import RunError, UsageError

# Key: a part of JAX's name of the device; the longest match is used.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "A100": 312.0,
    "A30": 165.0,
    "L4": 121.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}
_REASON = 300
_ADVICE = (
    "Run this on a machine with an NVIDIA GPU after pip install -c constraints.txt -e '.[cuda]', "
    "or try it with --rehearse"
)


def peak_tflops(device_kind: str) -> float:
    """The peak of a GPU by JAX's name, such as "NVIDIA H100 80GB HBM3". Raises UsageError if it is not listed."""
    words = f" {device_kind.replace('-', ' ')} "
    found = [name for name in PEAK_TFLOPS if f" {name} " in words]
    if not found:
        raise UsageError(
            f"--peak_tflops: {device_kind} is not in benchmarks/gpu/devices.py: pass the TFLOP/s of its data sheet, "
            "dense and in bfloat16"
        )
    return PEAK_TFLOPS[max(found, key=len)]


def require_gpu(*, is_rehearsal: bool) -> str:
    """JAX's name of the device. Raises RunError if it is not a GPU, unless this is a rehearsal."""
    try:
        backend = jax.default_backend()
        kind: str = jax.local_devices()[0].device_kind
    except Exception as error:  # of the plugin, or an assertion in JAX with an empty message
        asked = os.environ.get("JAX_PLATFORMS", "")
        unknown = f"no platform of JAX_PLATFORMS={asked} works; a plugin that failed says why above"
        reason = " ".join(str(error).split())[:_REASON] or unknown
        raise RunError(f"no GPU: JAX cannot start: {reason}. {_ADVICE}") from error
    if backend != "gpu" and not is_rehearsal:
        raise RunError(f"no GPU: JAX computes on the CPU here. {_ADVICE}")
    return kind


def add_gpu_flags(parser: argparse_flags.ArgumentParser, models: Sequence[str]) -> None:
    """The flags of both benchmarks that need a GPU."""
    add = parser.add_argument
    add("--models", nargs="+", choices=models, default=models, help="which of the models (default all)")
    add("--tokens", type=positive(int), default=16384, help="tokens per step or call (default 16384)")
    add("--samples_per_row", type=positive(int), default=1, help="samples of equal length that fill a row (default 1)")
    add(
        "--rehearse", action="store_true", help="run all of it with tiny models on any device; the numbers mean nothing"
    )
    add("--verbose", action="store_true", help="stack traces of errors")
    add_output_flags(parser, repeats=5)
