"""How the attention kernel for GPUs cuts its work, and which cuts are worth a trial."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """How the kernel cuts its work. queries, keys: tokens of a block, which divide 128; warps, stages: Triton's."""

    queries: int
    keys: int
    warps: int
    stages: int


def candidates(head_dim: int) -> tuple[Tiles, ...]:
    """The tiles to try, best first.

    The first suits an H100 or H200: by its compiler, the kernel then multiplies by warp groups and keeps all in
    registers. The last needs a third of the shared memory, and up to a head_dim of 256 fits on every GPU from Ampere
    on; for wider heads nothing was compiled.
    """
    small = Tiles(64, 32, 4, 2)
    if head_dim <= 64:
        return Tiles(128, 64, 4, 3), small
    if head_dim <= 128:
        return Tiles(128, 64, 8, 3), small
    return Tiles(128, 64, 8, 2), small
