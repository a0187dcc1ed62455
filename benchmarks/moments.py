"""How fast moments are computed, beside the machine's own matrix products: python -m benchmarks.moments.

The covariance takes D * D multiplications and additions of a token of width D: the rates count 2 D^2 operations.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from absl.flags import argparse_flags

from analysis.moments import Moments
from analysis.moments.device import device_moments
from benchmarks.common.measuring import Timings, alternate, machine, table
from core.base.command_line import CommandParser, positive, run_command
from core.base.dtypes import DTYPES

_STEP_TOKENS = 512


@dataclass(frozen=True)
class MomentsRate:
    """One way at one width.

    Attributes:
      mb_s: bytes of activations per second, in millions; tokens_s: tokens per second.
      gflop_s: 2 D^2 operations a token, per second; of_product: that over the rate of the product of two (2048, 2048)
        matrices of the dtype that the way computes in, measured in turns with it.
    """

    way: str
    width: int
    dtype: str
    mb_s: float
    tokens_s: float
    gflop_s: float
    of_product: float
    timings: Timings


def measure(width: int, dtype: str, n_tokens: int, product_size: int, repeats: int) -> list[MomentsRate]:
    """Both ways at one width, in turns with both products."""
    x = np.random.default_rng(0).normal(size=(n_tokens, width)).astype(DTYPES[dtype])
    steps = jnp.asarray(x.reshape(-1, min(_STEP_TOKENS, n_tokens), width))
    mask = jnp.ones(steps.shape[:2], bool)
    sums = device_moments(steps, mask).sums
    products = {dtype: _product(product_size, dtype) for dtype in ("float32", "float64")}
    sides: dict[str, Callable[[], object]] = {
        "Moments.of, float64": lambda: Moments.of(x),
        "device_moments, float32": lambda: jax.block_until_ready(device_moments(steps, mask, sums)),
        **products,
    }
    for side in sides.values():
        side()
    timings = alternate(sides, repeats)
    rates = {name: 2 * product_size**3 / _seconds(timings[name]) / 1e9 for name in products}
    return [_rate(way, x, timings[way], rates[way.split(", ")[1]]) for way in sides if way not in products]


def _seconds(timings: Timings) -> float:
    return max(timings.seconds, 1e-3)


def _rate(way: str, x: np.ndarray, timings: Timings, product: float) -> MomentsRate:
    tokens_s = len(x) / _seconds(timings)
    gflop_s = 2 * x.shape[1] ** 2 * tokens_s / 1e9
    return MomentsRate(
        way=way,
        width=x.shape[1],
        dtype=x.dtype.name,
        mb_s=round(x.nbytes / _seconds(timings) / 1e6, 1),
        tokens_s=round(tokens_s),
        gflop_s=round(gflop_s, 1),
        of_product=round(gflop_s / product, 3),
        timings=timings,
    )


def _product(size: int, dtype: str) -> Callable[[], object]:
    """A product of two matrices: JAX's in float32, numpy's in float64."""
    matrix = np.random.default_rng(1).normal(size=(size, size)).astype(dtype)
    other = matrix + 1
    if dtype == "float64":
        return lambda: matrix @ other
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
    on_device = jnp.asarray(matrix), jnp.asarray(other)
    return lambda: jax.block_until_ready(product(*on_device))


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--widths", type=positive(int), nargs="+", default=(576, 2304), help="default 576 2304")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of the tokens (default bfloat16)")
    parser.add_argument("--tokens", type=positive(int), default=8192, help="how many, rounded to 512 (default 8192)")
    parser.add_argument("--product", type=positive(int), default=2048, help="size of the matrices (default 2048)")
    parser.add_argument("--repeats", type=positive(int), default=5, help="rounds (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of the table")
    parser.add_argument("--verbose", action="store_true", help="show stack traces")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measures every width and prints the rates."""
    n_tokens = max(1, args.tokens // _STEP_TOKENS) * _STEP_TOKENS
    found = [rate for width in args.widths for rate in measure(width, args.dtype, n_tokens, args.product, args.repeats)]
    if args.json:
        print(json.dumps({"machine": machine(), "tokens": n_tokens, "rates": [asdict(rate) for rate in found]}))
        return
    header = ["way", "width", "MB/s", "tokens/s", "GFLOP/s", "of its product"]
    print(table(header, [[r.way, r.width, r.mb_s, r.tokens_s, r.gflop_s, f"{r.of_product:.2f}"] for r in found]))


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
