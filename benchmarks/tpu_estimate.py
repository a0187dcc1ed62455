"""The TPU laboratory for published model shapes: compiles the extraction step without a TPU.

Needs libtpu, but no TPU, weights or hub. See README.md and docs/tpu_laboratory.md.
"""

import argparse
import json
from collections.abc import Sequence

from absl.flags import argparse_flags

from benchmarks.common.measuring import table
from benchmarks.common.shapes import Case, shape_of
from core.base.command_line import CommandParser, run_command
from core.base.errors import UsageError
from core.pricing.tpu_estimate import StepEstimate, estimate_step
from core.step.backend import StepRequest
from core.step.capture import existing_layer
from core.step.layout import ROW_MULTIPLE
from core.step.model_shape import check_sample_length
from qwen2_jax import Capture

# Per step and chip.
TOKENS = 8192
CASES = (
    Case("Qwen2.5-0.5B", None, 512, 0.65),
    Case("Qwen2.5-0.5B", None, 2048, 0.60),
    Case("Qwen2.5-1.5B", None, 512, 0.75),
    Case("Qwen2.5-1.5B", None, 2048, 0.75),
    Case("Qwen2.5-7B", (13,), 2048, 0.80),
    Case("gemma-2-2b", (12,), 2048, 0.70),
    Case("gemma-2-9b", (41,), 2048, rows=8),
    Case("gemma-2-9b", (41,), 2048, layout="2d", rows=16),
)


def estimate(case: Case, topology: str) -> StepEstimate:
    """The estimate for residuals, computed and stored in bfloat16. Raises as `estimate_step` does."""
    config = shape_of(case.model)
    request = StepRequest(Capture(case.layers_of(config)), "bfloat16", "bfloat16")
    rows = case.rows or TOKENS // case.length
    return estimate_step(config, request, topology, rows=rows, length=case.length, mesh_shape=case.layout)


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--tpu_topology", default="v5e:8x8", help="such as v5e:8x8, v6e:8x8 or v5p:2x2x4 (default v5e:8x8)")
    add("--model", help="a name in model_shapes.json, a model folder or a hub id, instead of the table of cases")
    add("--layers", type=int, nargs="+", help="with --model: captured layers (default all)")
    add("--row_length", type=int, help="with --model: a multiple of 128 (default 2048)")
    add("--mesh", help="with --model, on one host: auto, 1d, 2d, DATAxMODEL (default auto)")
    add("--json", action="store_true", help="print one JSON object on stdout instead of the table")
    add("--verbose", action="store_true", help="every operation of every case; stack traces of errors")
    return parser


def _verdict(case: Case, found: StepEstimate) -> str:
    if case.target is None:
        return "it fits: yes"  # what does not fit is an error
    return f">= {case.target:.2f}: {'yes' if found.mfu >= case.target else 'no'}"


def report(results: Sequence[tuple[Case, StepEstimate]]) -> str:
    """The printed table."""
    header = ["case", "chips a copy", "memory", "step", "kernels", "MFU", "target", "tokens/s a chip", "$ for 10^9"]
    header += ["of host link", "of network"]
    rows = [
        [
            case.name,
            found.model_parallel,
            f"{found.hbm_bytes / 1e9:.1f} of {found.hbm_capacity / 1e9:.1f} GB",
            f"{1e3 * found.step_seconds:.1f} ms",
            f"{1e3 * found.kernel_seconds:.1f} ms",
            f"{found.mfu:.3f}",
            _verdict(case, found),
            f"{found.tokens_per_second:.0f}",
            f"{found.dollars:.2f}",
            f"{found.link_share:.0%}",
            f"{found.network_share:.0%}",
        ]
        for case, found in results
    ]
    return table(header, rows)


def run(args: argparse.Namespace) -> None:
    """Compiles the cases one after another and prints the estimates."""
    cases = [_case(args)] if args.model else CASES
    for name in ("layers", "row_length", "mesh"):
        if not args.model and getattr(args, name) is not None:
            raise UsageError(f"--{name} needs --model: the cases of the table have their own")
    results = [(case, estimate(case, args.tpu_topology)) for case in cases]
    if args.json:
        found = {case.name: result.to_json() for case, result in results}
        print(json.dumps(next(iter(found.values())) if args.model else found))
        return
    print(report(results))
    for case, result in results if args.model or args.verbose else ():
        print("\n".join(["", case.name, *result.lines()]))


def _case(args: argparse.Namespace) -> Case:
    length = 2048 if args.row_length is None else args.row_length
    if length < 1 or length % ROW_MULTIPLE or length > TOKENS:
        raise UsageError(f"--row_length {length}: must be a multiple of {ROW_MULTIPLE}, at most {TOKENS}")
    config = shape_of(args.model)
    check_sample_length(length, config, args.model, "--row_length")
    layers = [existing_layer(layer, f"--layers {layer}", config, args.model) for layer in args.layers or ()]
    return Case(args.model, tuple(layers) or None, length, layout=args.mesh or "auto")


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
