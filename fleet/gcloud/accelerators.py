"""TPU types: the number of hosts of a slice, and the runtime version.

Source: Google Cloud's tables of TPU configurations. v2, v3, v4 and v5p are named after TensorCores, of which a host has
8; v5litepod and v6e after chips, of which a host of a larger slice has 4.
"""

import re
from collections.abc import Container
from dataclasses import dataclass

from core.base.errors import UsageError


@dataclass(frozen=True)
class Generation:
    """One generation of TPUs: valid sizes in its name, how they map to hosts, and the runtime version for JAX."""

    sizes: Container[int]
    size_of_a_host: int
    largest_on_one_host: int
    runtime: str


_CHIPS = (1, 4, 8, 16, 32, 64, 128, 256)
GENERATIONS = {
    "v2": Generation((8, 32, 128, 256, 512), 8, 8, "tpu-ubuntu2204-base"),
    "v3": Generation((8, 32, 64, 128, 256, 512, 1024, 2048), 8, 8, "tpu-ubuntu2204-base"),
    "v4": Generation(range(8, 8192 + 1, 8), 8, 8, "tpu-ubuntu2204-base"),
    "v5litepod": Generation(_CHIPS, 4, 8, "v2-alpha-tpuv5-lite"),
    "v5p": Generation(range(8, 12288 + 1, 8), 8, 8, "v2-alpha-tpuv5"),
    "v6e": Generation(_CHIPS, 4, 8, "v2-alpha-tpuv6e"),
}
DEFAULT_TYPE = "v5litepod-8"


def _split(tpu_type: str) -> tuple[Generation, int]:
    match = re.fullmatch(r"(v[0-9][a-z]*)-([1-9][0-9]{0,4})", tpu_type)
    generation = GENERATIONS.get(match[1]) if match else None
    if match is None or generation is None:
        known = ", ".join(f"{name}-N" for name in GENERATIONS)
        raise UsageError(f"{tpu_type!r} is not a TPU type: use one of {known}")
    if int(match[2]) not in generation.sizes:
        raise UsageError(f"{tpu_type!r}: {match[1]} has no slice of size {match[2]}")
    return generation, int(match[2])


def require_tpu_type(tpu_type: str) -> str:
    """Returns the type. Raises UsageError when there is no such slice."""
    _split(tpu_type)
    return tpu_type


def hosts_of(tpu_type: str) -> int:
    """How many hosts a slice has: 1 for v5litepod-8, 16 for v5litepod-64."""
    generation, size = _split(tpu_type)
    return 1 if size <= generation.largest_on_one_host else size // generation.size_of_a_host


def runtime_of(tpu_type: str) -> str:
    """The runtime version for JAX on this type."""
    return _split(tpu_type)[0].runtime
