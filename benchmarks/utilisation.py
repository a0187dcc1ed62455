"""How much of a run is forward passes: end-to-end wall time over the time of the same steps alone.

Both sides run alternately in one process, with the model loaded and every shape compiled. See README.md.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from absl.flags import argparse_flags

from benchmarks.common.cases import add_case_flags, case_layers
from benchmarks.common.engine import Engine
from benchmarks.common.measuring import Ratio, Timings, alternate, machine, table
from benchmarks.common.workload import Workload, add_workload_flags, workload_of
from core.base.command_line import CommandParser, positive, run_command
from core.base.errors import RunError
from core.run.progress import Summary
from qwen2_jax import load_config

TARGET = 1.10


@dataclass(frozen=True)
class UtilisationResult:
    """One case; `computed_tokens` counts padding, `tokens` does not; `stages` are those of the last run."""

    case: str
    n_layers: int
    tokens: int
    computed_tokens: int
    steps: int
    shards: int
    bytes: int
    ratio: Ratio
    tokens_per_second: float
    stages: dict[str, float]
    timings: dict[str, Timings]


def measure(engine: Engine, case: str, folder: Path, repeats: int) -> UtilisationResult:
    """Runs both sides in turns. Raises RunError when a run commits other tokens than the steps hold."""
    steps = engine.all_steps()
    summaries: list[Summary] = []

    def end_to_end() -> None:
        summaries.append(engine.run(folder / str(len(summaries))))
        # The next repetition should find the same free disk space.
        shutil.rmtree(folder / str(len(summaries) - 1))

    end_to_end()
    timings = alternate({"forward": lambda: engine.run_steps(steps), "end_to_end": end_to_end}, repeats)
    last = summaries[-1]
    in_steps = sum(int((step.segment_ids > 0).sum()) for step in steps)
    if last.tokens != in_steps:
        raise RunError(f"the run committed {last.tokens} tokens, the steps alone computed {in_steps}")
    return UtilisationResult(
        case=case,
        n_layers=len(engine.job.capture.layers),
        tokens=last.tokens,
        computed_tokens=sum(step.tokens.size for step in steps),
        steps=len(steps),
        shards=last.shards,
        bytes=last.bytes,
        ratio=Ratio.of(timings["end_to_end"], timings["forward"]),
        tokens_per_second=round(last.tokens / timings["end_to_end"].seconds, 1),
        stages=last.stages,
        timings=timings,
    )


def shard_mb(workload: Workload, windows: int, n_layers: int, d_model: int, itemsize: int) -> float:
    """The shard size at which the workload makes about `windows` windows, and no fewer."""
    # A window ends with the sample that reaches the size, so it is larger by up to one sample.
    tokens = max(workload.n_tokens / windows - max(workload.lengths) / 2, 1)
    return tokens * n_layers * d_model * itemsize / 2**20


def measure_case(case: str, workload: Workload, folder: Path, args: argparse.Namespace) -> UtilisationResult:
    """Loads the engine of a case and measures it."""
    config = load_config(workload.model_path)
    layers = case_layers(case, config.n_layers)
    engine = Engine.load(
        workload.model_path,
        workload.arc_stream,
        layers=layers,
        dtype=args.dtype,
        batch_size=args.batch_size,
        shard_mb=shard_mb(workload, args.windows, len(layers), config.d_model, 4 if args.dtype == "float32" else 2),
    )
    return measure(engine, case, folder / case, args.repeats)


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add_workload_flags(parser, prompts=64)
    add_case_flags(parser, dtypes=("float16", "bfloat16", "float32"), repeats=5)
    parser.add_argument(
        "--windows", type=positive(int), default=4, help="at least this many windows, and so shards (default 4)"
    )
    return parser


def report(results: Sequence[UtilisationResult]) -> str:
    """The printed table."""
    header = [
        "case",
        "steps",
        "shards",
        "forward alone",
        "end to end",
        "ratio (rounds)",
        f"<= {TARGET:.2f}",
        "of CPU time",
    ]
    rows = [
        [
            f"{result.case} ({result.n_layers} layers)",
            result.steps,
            result.shards,
            f"{result.timings['forward'].seconds:.2f} s",
            f"{result.timings['end_to_end'].seconds:.2f} s",
            result.ratio,
            "yes" if result.ratio.median <= TARGET else "no",
            f"{result.ratio.cpu:.2f}",
        ]
        for result in results
    ]
    return table(header, rows)


def run(args: argparse.Namespace) -> None:
    """Measures the cases and prints them."""
    with tempfile.TemporaryDirectory(prefix="utilisation_") as scratch:
        workload = workload_of(args, Path(scratch))
        results = [measure_case(case, workload, Path(scratch), args) for case in args.cases]
    if args.json:
        found: dict[str, Any] = {"machine": machine(), "workload": workload.spread(), "target": TARGET}
        print(json.dumps(found | {"cases": [asdict(result) for result in results]}))
        return
    print(report(results))
    for result in results:
        busy = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in result.stages.items())
        print(f"busy, {result.case}, last run: {busy}", file=sys.stderr)


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
