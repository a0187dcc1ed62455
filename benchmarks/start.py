"""Time from the start of the process to the first committed shard, stage by stage: python -m benchmarks.start.

Each start is a separate process, on a stream of one prompt, so that little but the start is timed. Compiled programs
and converted weights are either on disk from an earlier start or not.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from absl.flags import argparse_flags

from benchmarks.common.measuring import machine, table
from benchmarks.common.workload import add_workload_flags, workload_of
from core.base.command_line import CommandParser, positive, run_command
from core.base.errors import RunError

_ROOT = Path(__file__).parents[1]
STAGES = ("interpreter", "imports", "job", "first window", "load", "first shard")
"""Process start; imports; config, digest and placement of the model; tokenizer and prompt; weights; the rest."""


@dataclass(frozen=True)
class Start:
    """Whether programs and weights are kept from earlier starts, and the median seconds of each of STAGES."""

    programs: bool
    weights: bool
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """From the start of the process to the first commit."""
        return round(sum(self.seconds.values()), 3)


def one(model_path: str, stream: Path, folder: Path, programs: Path, weights: Path) -> dict[str, float]:
    """Starts once, with these caches; returns the seconds of each stage. Raises RunError when it fails."""
    config = {
        "model_path": model_path,
        "dataset_path": str(stream),
        "predictions_per_task": 1,
        "compute_dtype": "float32",
        "compilation_cache_dir": str(programs),
        "weights_cache_dir": str(weights),
        "output_dir": str(folder / "out"),
        "checkpoint_dir": str(folder / "checkpoints"),
    }
    started = time.time()
    over = json.loads(_run("benchmarks/one_start.py", json.dumps(config)))
    moments = [started, *(over[stage] for stage in STAGES)]
    return {stage: end - begin for stage, (begin, end) in zip(STAGES, itertools.pairwise(moments), strict=True)}


def _run(script: str, *args: object) -> str:
    """The stdout of a script of the repository. Raises RunError with its last line of stderr when it fails."""
    done = subprocess.run(
        [sys.executable, _ROOT / script, *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(f"{script} failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def measure(model_path: str, stream: Path, folder: Path, repeats: int) -> list[Start]:
    """All four cases. Every round runs each of them once, so that a machine that slows down slows all alike."""
    converted, nowhere = folder / "weights", folder / "no_weights"
    _run("scripts/convert_checkpoint.py", model_path, "--weights_cache_dir", converted, "--dtype", "float32")
    kept = folder / "programs"
    one(model_path, stream, folder / "first", kept, nowhere)
    found: dict[tuple[bool, bool], list[dict[str, float]]] = {
        (programs, weights): [] for programs in (False, True) for weights in (False, True)
    }
    for number in range(repeats):
        for programs, weights in found:
            place = folder / f"{number}_{programs:d}{weights:d}"
            caches = kept if programs else place / "programs", converted if weights else nowhere
            found[programs, weights].append(one(model_path, stream, place, *caches))
    return [
        Start(*case, {stage: round(statistics.median(start[stage] for start in starts), 3) for stage in STAGES})
        for case, starts in found.items()
    ]


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add_workload_flags(parser, prompts=1)
    parser.add_argument("--repeats", type=positive(int), default=3, help="repetitions of each case (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of the table")
    return parser


def report(starts: Sequence[Start]) -> str:
    """The printed table."""
    rows = [
        [
            "kept" if start.programs else "compiled",
            "converted" if start.weights else "read",
            *(f"{start.seconds[stage]:.2f} s" for stage in STAGES),
            f"{start.total:.2f} s",
        ]
        for start in starts
    ]
    return table(["programs", "weights", *STAGES, "total"], rows)


def run(args: argparse.Namespace) -> None:
    """Measures the cases and prints them."""
    with tempfile.TemporaryDirectory(prefix="start_") as scratch:
        workload = workload_of(args, Path(scratch))
        starts = measure(workload.model_path, workload.arc_stream, Path(scratch), args.repeats)
    if args.json:
        found = [asdict(start) | {"total": start.total} for start in starts]
        print(json.dumps({"machine": machine(), "workload": workload.spread(), "starts": found}))
    else:
        print(report(starts))


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
