"""Attention alone on a GPU: the kernel with many block sizes, all logits at once, cuDNN; for the heads of each model.

Use it to choose the sizes in `qwen2_jax.attention.gpu_tiles.candidates`. See README.md.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl.flags import argparse_flags
from jaxtyping import Array

from benchmarks.common.measuring import alternate, machine, table
from benchmarks.common.shapes import shape_of
from benchmarks.gpu.devices import add_gpu_flags, require_gpu
from benchmarks.gpu.step import UniformBatch
from core.base.command_line import CommandParser, positive, run_command
from core.base.errors import UsageError
from qwen2_jax import DecoderConfig
from qwen2_jax.attention.dense import dense_attention
from qwen2_jax.attention.gpu import triton_attention
from qwen2_jax.attention.gpu_tiles import Tiles, candidates
from qwen2_jax.attention.logits import kv_start

MODELS = ("Qwen2.5-0.5B", "Qwen2.5-7B", "gemma-2-2b")
# From q, k, v, segment ids and the first visible index.
Way = Callable[..., Array]
GRID = tuple(itertools.starmap(Tiles, itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))))
CALLS = 20
LISTED = 8


@dataclass(frozen=True)
class Heads:
    """The heads of a model's attention."""

    kv_heads: int
    groups: int
    head_dim: int
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, config: DecoderConfig, *, is_tiny: bool) -> "Heads":
        """The heads of a config."""
        kv_heads, groups = (1, 1) if is_tiny else (config.n_kv_heads, config.n_heads // config.n_kv_heads)
        return cls(kv_heads, groups, config.head_dim, config.query_scale, config.attn_softcap)


@dataclass(frozen=True)
class Found:
    """One way, on one model's heads.

    Attributes:
      tiles: block sizes of the kernel.
      seconds: of one call, median.
      tflops: TFLOP/s, counting what causal attention inside samples needs.
      distance: relative distance from all logits at once.
    """

    way: str
    tiles: Tiles | None
    seconds: float
    tflops: float
    distance: float


def operands(heads: Heads, workload: UniformBatch) -> tuple[Array, Array, Array, Array, Array]:
    """q, k, v, segment ids and the first visible index."""
    shape = workload.rows, workload.length, heads.kv_heads
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (*shape, heads.groups, heads.head_dim), jnp.bfloat16)
    k, v = (jax.random.normal(key, (*shape, heads.head_dim), jnp.bfloat16) for key in keys[1:])
    segment_ids = jnp.asarray(workload.arrays(1).segment_ids)
    return q, k, v, segment_ids, kv_start(segment_ids)


def ways(heads: Heads, *, is_tiny: bool) -> Iterator[tuple[str, Tiles | None, Way]]:
    """Names, block sizes of the kernel and functions; all logits at once comes first."""
    settings: dict[str, Any] = {"scale": heads.scale, "softcap": heads.softcap}
    dense: Callable[..., Array] = partial(dense_attention, **settings)
    yield "all logits at once", None, lambda q, k, v, segment_ids, first: dense(q, k, v, first, None)
    if heads.softcap is None:
        yield "cuDNN, samples as a mask", None, partial(_cudnn, scale=heads.scale)
    chosen = candidates(heads.head_dim)
    for tiles in chosen[-1:] if is_tiny else dict.fromkeys((*chosen, *GRID)):
        kernel = partial(triton_attention, **settings, tiles=tiles, interpret=is_tiny)
        name = f"{tiles.queries} x {tiles.keys}, {tiles.warps} warps, {tiles.stages} stages"
        name += " (chosen)" if tiles == chosen[0] else ""
        yield name, tiles, lambda q, k, v, segment_ids, first, kernel=kernel: kernel(q, k, v, first, None)


def _cudnn(q: Array, k: Array, v: Array, segment_ids: Array, first: Array, *, scale: float) -> Array:
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    flat = q.reshape(*q.shape[:2], -1, q.shape[-1])
    out = jax.nn.dot_product_attention(flat, k, v, mask=same, is_causal=True, scale=scale, implementation="cudnn")
    return out.reshape(q.shape)


def measure(model: str, args: argparse.Namespace) -> list[Found]:
    """The ways that run here, fastest first; prints which do not, and why."""
    heads, workload = Heads.of(shape_of(model), is_tiny=args.rehearse), workload_of(args)
    given = operands(heads, workload)
    calls: dict[str, Callable[[], object]] = {}
    distances: dict[str, float] = {}
    cuts: dict[str, Tiles | None] = {}
    expected: np.ndarray | None = None
    for name, tiles, way in ways(heads, is_tiny=args.rehearse):
        call = jax.jit(way)
        try:
            output = np.asarray(call(*given), np.float32)
        except Exception as error:  # tiles too large for the GPU, cuDNN that is not there
            print(f"{model}: {name}: {type(error).__name__}: {' '.join(str(error).split())[:120]}", file=sys.stderr)
            continue
        expected = output if expected is None else expected
        distances[name] = float(np.linalg.norm(output - expected) / np.linalg.norm(expected))
        calls[name], cuts[name] = partial(_repeat, call, given), tiles
    timings, flops = alternate(calls, args.repeats), _flops(heads, workload)
    seconds = {name: statistics.median(timings[name].wall) / CALLS for name in calls}
    return [
        Found(name, cuts[name], seconds[name], flops / seconds[name] / 1e12, distances[name])
        for name in sorted(calls, key=seconds.__getitem__)
    ]


def workload_of(args: argparse.Namespace) -> UniformBatch:
    """The batch of the flags. Raises UsageError when the row length does not divide evenly."""
    length, samples = args.row_length, args.samples_per_row
    if length % 128 or length > args.tokens:
        raise UsageError(f"--row_length {length}: must be a multiple of 128, at most --tokens {args.tokens}")
    if length % samples:
        raise UsageError(f"--samples_per_row {samples}: must divide --row_length {length}")
    return UniformBatch(1, 128, samples) if args.rehearse else UniformBatch(args.tokens // length, length, samples)


def _repeat(call: Callable[..., Array], given: Sequence[Array]) -> None:
    for _ in range(CALLS):
        out = call(*given)
    out.block_until_ready()


def _flops(heads: Heads, workload: UniformBatch) -> float:
    """FLOPs of both products, for the keys that causal attention inside samples needs."""
    seen = workload.sample_length * (workload.sample_length + 1) / 2
    return 4.0 * workload.rows * workload.samples * seen * heads.kv_heads * heads.groups * heads.head_dim


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add_gpu_flags(parser, MODELS)
    parser.add_argument("--row_length", type=positive(int), default=2048, help="a multiple of 128 (default 2048)")
    return parser


def report(model: str, found: Sequence[Found]) -> str:
    """The fastest tiles, those that a run tries, and the ways without our kernel."""
    tried = (None, *candidates(shape_of(model).head_dim))
    listed = [row for place, row in enumerate(found) if place < LISTED or row.tiles in tried]
    rows = [[row.way, f"{1e3 * row.seconds:.3f} ms", f"{row.tflops:.0f}", f"{row.distance:.1e}"] for row in listed]
    return f"{model}\n" + table(["way", "a call", "TFLOP/s", "distance"], rows)


def run(args: argparse.Namespace) -> None:
    """Measures the heads of each model and prints the results."""
    kind = require_gpu(is_rehearsal=args.rehearse)
    results = {model: measure(model, args) for model in args.models}
    if args.json:
        found = {model: [asdict(row) for row in rows] for model, rows in results.items()}
        print(json.dumps({"machine": machine(), "device_kind": kind, "models": found}))
        return
    print("\n\n".join(report(model, rows) for model, rows in results.items()))


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
