"""Which tiles the attention kernel for GPUs is cut into, found out on the GPU that is to run it.

A kernel may ask for more shared memory than a GPU has, or be compiled for none that old; a run should learn that before
its first step, and go on without it.

Axes: B rows, T tokens, K kv heads, G query heads per kv head, H head_dim.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, BFloat16, Int

from core.base.errors import ModelError
from qwen2_jax.attention.dense import dense_attention
from qwen2_jax.attention.gpu_tiles import Tiles, candidates
from qwen2_jax.attention.logits import kv_start

_LENGTH, _WINDOW, _SCALE = 256, 150, 0.3
# The kernel and the dense path each round probabilities and outputs, at most 1 in this case, to bfloat16.
_TOLERANCE = 2**-6
_REASON = 200


@cache
def usable_tiles(head_dim: int, softcap: float | None) -> Tiles | None:
    """The first of the `candidates` with which this process's GPU computes what the dense path does.

    None, after a line that says why, when there is none. Which it is depends on the kind of GPU alone, since a run that
    is started again should compute the same bits: memory that somebody else fills for a moment chooses nothing, and is
    a ModelError.
    """
    # A thread of its own: the caller may be tracing, and here something has to be computed.
    with ThreadPoolExecutor(1, "attention") as thread:
        reasons: list[str] = []
        for tiles in candidates(head_dim):
            reason = thread.submit(_fault, head_dim, softcap, tiles).result()
            if reason is None:
                logging.info("attention: the kernel for GPUs, cut as %s%s", tiles, _passed_over(reasons))
                return tiles
            reasons.append(reason)
    logging.warning(
        "attention: the kernel for GPUs cannot be used here, so a step holds all logits of its rows: %s",
        _listed(reasons),
    )
    return None


def _passed_over(reasons: list[str]) -> str:
    return f"; larger blocks do not run here: {_listed(reasons)}" if reasons else ""


def _listed(reasons: list[str]) -> str:
    return "; ".join(dict.fromkeys(reasons))


def _fault(head_dim: int, softcap: float | None, tiles: Tiles) -> str | None:
    """What is wrong with the kernel on this GPU, in a few words; None: nothing."""
    programs: list[jax.stages.Compiled] = []
    try:
        operands = _case(head_dim)
        # Here, since JAX has announced that what the kernel is written in will go one day.
        from qwen2_jax.attention.gpu import triton_attention

        paths = partial(triton_attention, tiles=tiles), dense_attention
        alike = (partial(path, scale=_SCALE, softcap=softcap) for path in paths)
        programs += [jax.jit(path).lower(*operands, None).compile() for path in alike]
        actual, expected = (np.asarray(program(*operands, None), np.float32) for program in programs)
    except Exception as error:  # the compiler's and the runtime's own kinds, which differ by version
        reason = " ".join(str(error).split())[:_REASON]
        if _is_memory_full(str(error), is_compiled=bool(programs)):
            raise ModelError(
                f"the GPU's memory is full before the first step; does something else run on it? {reason}"
            ) from error
        return f"{type(error).__name__}: {reason}"
    off = np.abs(actual - expected).max()
    return None if off <= _TOLERANCE else f"it is off by {off:.2g}"


def _is_memory_full(message: str, *, is_compiled: bool) -> bool:
    """Of the GPU itself. The compiler says RESOURCE_EXHAUSTED of registers and shared memory too."""
    if is_compiled and "RESOURCE_EXHAUSTED" in message:
        return True
    return "out of memory" in message.lower().replace("_", " ")


def _case(
    head_dim: int,
) -> tuple[BFloat16[Array, "B T K G H"], BFloat16[Array, "B T K H"], BFloat16[Array, "B T K H"], Int[Array, "B T"]]:
    """q, k, v and the first key that is seen, of two rows with several blocks, samples and a window."""
    rng = np.random.default_rng(0)
    shapes = ((2, _LENGTH, 1, 2, head_dim), (2, _LENGTH, 1, head_dim), (2, _LENGTH, 1, head_dim))
    q, k, v = (jnp.asarray(rng.uniform(-1, 1, shape), jnp.bfloat16) for shape in shapes)
    segment_ids = np.stack([np.repeat([1, 2, 0], [90, 140, 26]), np.ones(_LENGTH, int)]).astype(np.int32)
    return q, k, v, kv_start(jnp.asarray(segment_ids), jnp.int32(_WINDOW))
