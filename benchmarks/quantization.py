"""How much 8-bit codes lose on real activations, for each way to share scales: python -m benchmarks.quantization.

Axis letters: L layers, N tokens of all prompts, D d_model.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl.flags import argparse_flags
from jaxtyping import Float32, Float64

from benchmarks.common.engine import Engine
from benchmarks.common.measuring import machine, table
from benchmarks.common.workload import add_workload_flags, workload_of
from core.base.command_line import CommandParser, run_command
from core.object_store.sinks import deflate_block
from core.reduce.arithmetic import quantize
from core.reduce.reductions import QUANTIZATIONS, Quantization
from core.step.host_copies import begin_copies, on_host
from core.step.layout import sample_spans, step_arrays

BLOCKS = (0, 128, 64, 32, 16)
_SAMPLE_BYTES = 4 << 20


@dataclass(frozen=True)
class Loss:
    """One way to code the tokens of a layer.

    Attributes:
      bytes_per_value: codes and scales; gzip_ratio: of the codes, compressed over raw.
      relative_l2: mean over the tokens of |x - restored| / |x|; worst_cosine: between a token and what is restored.
    """

    layer: int
    scale: str
    bytes_per_value: float
    gzip_ratio: float
    relative_l2: float
    worst_cosine: float


def loss(layer: int, scale: str, x: np.ndarray, restored: np.ndarray, codes: np.ndarray, n_scales: int) -> Loss:
    """x, restored: (N, D). The figures in float64."""
    exact, found = x.astype(np.float64), restored.astype(np.float64)
    raw = memoryview(codes.tobytes())[:_SAMPLE_BYTES]
    return Loss(
        layer=layer,
        scale=scale,
        bytes_per_value=round(1 + 4 * n_scales / x.size, 4),
        gzip_ratio=round(len(deflate_block([raw])) / len(raw), 3),
        relative_l2=round(float(np.mean(_lengths(found - exact) / _lengths(exact))), 5),
        worst_cosine=round(float(np.min((found * exact).sum(1) / (_lengths(found) * _lengths(exact)))), 5),
    )


def _lengths(x: Float64[np.ndarray, "N D"]) -> Float64[np.ndarray, "N"]:
    return np.linalg.norm(x, axis=1)


def losses(layer: int, x: Float32[np.ndarray, "N D"], is_first: np.ndarray) -> Iterator[Loss]:
    """The losses of every way. is_first: which tokens are the first of their prompt."""
    for kind in QUANTIZATIONS:
        for block in BLOCKS:
            codes, scale, restored = map(np.asarray, quantize(jnp.asarray(x), Quantization(kind, block)))
            yield loss(layer, f"{kind}, {block or 'token'}", x, restored, codes, scale.size)
    yield _by_channel(layer, "int8, channel", x, np.zeros_like(is_first))
    yield _by_channel(layer, "int8, channel, first tokens whole", x, is_first)


def _by_channel(layer: int, name: str, x: Float32[np.ndarray, "N D"], whole: np.ndarray) -> Loss:
    """One scale for each of the D channels over all tokens but the `whole` ones, which stay as they are."""
    scale = np.abs(x[~whole]).max(axis=0) / 127
    codes = np.clip(np.round(x / scale), -127, 127)
    restored = np.where(whole[:, None], x, codes * scale)
    return loss(layer, name, x, restored, codes.astype(np.int8), scale.size)


def activations(engine: Engine) -> tuple[Float32[np.ndarray, "L N D"], np.ndarray]:
    """The residuals of all tokens of the workload, and which tokens are the first of their prompt."""
    values, firsts = [], []
    for window in engine.job.windows():
        for part in engine.job.parts_of(window):
            for layout in engine.job.layouts_of(part):
                output = engine.model.step(step_arrays(layout, [sample.token_ids for sample in part.own.samples]))
                (residual,) = on_host(begin_copies(output)).arrays.values()
                for row, _, start, stop in sample_spans(layout, part.own.lengths):
                    values.append(residual[:, row, start:stop].copy())
                    firsts.append(np.arange(stop - start) == 0)
    return np.concatenate(values, axis=1), np.concatenate(firsts)


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add_workload_flags(parser, prompts=8)
    parser.add_argument("--layers", type=int, nargs="+", default=(1, 7, 14, 21, 28), help="default 1 7 14 21 28")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of the table")
    return parser


def report(found: list[Loss]) -> str:
    """One line for each way: the range over the layers."""

    def spread(of: list[Loss], value: Callable[[Loss], float], form: str) -> str:
        numbers = sorted(map(value, of))
        return f"{numbers[0]:{form}} to {numbers[-1]:{form}}"

    rows = []
    for scale in dict.fromkeys(one.scale for one in found):
        of = [one for one in found if one.scale == scale]
        cosine = min(one.worst_cosine for one in of)
        ratio = spread(of, lambda one: one.gzip_ratio, ".2f")
        rows.append(
            [scale, f"{of[0].bytes_per_value:.3f}", ratio, spread(of, lambda one: one.relative_l2, ".2%"), cosine]
        )
    return table(["codes, a scale for", "bytes a value", "gzip", "relative L2", "worst cosine"], rows)


def run(args: argparse.Namespace) -> None:
    """Codes the residual stream of the layers in every way and prints what is lost."""
    with tempfile.TemporaryDirectory(prefix="quantization_") as scratch:
        workload = workload_of(args, Path(scratch))
        engine = Engine.load(
            workload.model_path,
            workload.arc_stream,
            layers=args.layers,
            dtype="float32",
            batch_size=4,
            shard_mb=1024,
        )
        values, is_first = activations(engine)
    found = [one for layer, x in zip(args.layers, values, strict=True) for one in losses(layer, x, is_first)]
    if args.json:
        print(
            json.dumps({"machine": machine(), "workload": workload.spread(), "losses": [asdict(one) for one in found]})
        )
    else:
        print(report(found))


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
