"""Side by side with what a user could take instead: same prompts, weights and stored arrays, tokens a second.

Every peer is in a file of its own, `peer_*.py`; one whose package is not installed is left out with a line. See
README.md for what is timed.
"""

import argparse
import importlib
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl.flags import argparse_flags

from benchmarks.agreement import read_shards, worst_disagreement
from benchmarks.cases import add_case_flags, case_layers
from benchmarks.engine import Engine
from benchmarks.hf_model import export_folder
from benchmarks.measuring import Ratio, Timings, alternate, machine, table
from benchmarks.peer_sides import Request, Side
from benchmarks.workload import Workload, add_workload_flags, build_workload, workload_of
from core.command_line import CommandParser, run_command
from core.errors import RunError, UsageError
from qwen2_jax import load_config


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    Attributes:
      module: in this package, with a function `side`; package: what has to be installed.
      tolerance: on the relative distance of its activations from ours.
      settings: further arguments of `side`.
      one_layer: whether it can store no more than one.
      cut: whether the user has taken the model apart.
    """

    what: str
    module: str
    package: str
    tolerance: float = 1e-4
    settings: dict[str, Any] = field(default_factory=dict)
    one_layer: bool = False
    cut: bool = False

    @property
    def is_float32(self) -> bool:
        """Whether it computes as precisely as ours does."""
        return self.settings.get("dtype", torch.float32) is torch.float32


def _transformers(
    what: str, dtype: torch.dtype, *, is_sorted: bool = True, compiled: bool = False, cut: bool = False
) -> Peer:
    settings = {"dtype": dtype, "is_sorted": is_sorted, "compiled": compiled, "cut": cut}
    tolerance = 1e-4 if dtype is torch.float32 else 5e-2
    return Peer(what, "peer_transformers", "transformers", tolerance, settings, cut=cut)


PEERS = {
    "hf": _transformers("transformers, batches in stream order", torch.float32, is_sorted=False),
    "hf_sorted": _transformers("transformers, sorted by length", torch.float32),
    "hf_compiled": _transformers("transformers, sorted, torch.compile", torch.float32, compiled=True),
    "hf_bf16": _transformers("transformers, sorted, bfloat16", torch.bfloat16),
    "hf_bf16_compiled": _transformers("transformers, sorted, bfloat16, torch.compile", torch.bfloat16, compiled=True),
    "transformer_lens": Peer(
        "TransformerLens, sorted, stops behind the layer", "peer_transformer_lens", "transformer_lens"
    ),
    "nnsight": Peer("nnsight, sorted, stops behind the layer", "peer_nnsight", "nnsight"),
    "sae_lens": Peer("SAELens' caching runner", "peer_sae_lens", "sae_lens", one_layer=True),
    "hf_cut": _transformers("transformers, sorted, later layers removed by hand", torch.float32, cut=True),
    "hf_bf16_cut": _transformers("the same in bfloat16", torch.bfloat16, cut=True),
}
MODEL_FOLDER = "model"
# Ours over the fastest peer: in float32, and at any dtype.
TARGETS = {"middle": (6.0, 3.0), "all": (4.0, 4.0)}


@dataclass(frozen=True)
class PeerRow:
    """One peer against ours in the same rounds."""

    peer: str
    computed_tokens: int
    tokens_per_second: float
    ratio: Ratio
    ratio_with_compilation: float
    disagreement: float


@dataclass(frozen=True)
class CaseResult:
    """One case. `compilation_seconds` is what our first run took more than the median one."""

    case: str
    layers: tuple[int, ...]
    tokens: int
    computed_tokens: int
    compilation_seconds: float
    tokens_per_second: float
    peers: list[PeerRow]
    timings: dict[str, Timings]


def installed(peers: Sequence[str]) -> list[str]:
    """Those that can run; says which cannot. Raises UsageError when none can."""
    found = [name for name in peers if importlib.util.find_spec(PEERS[name].package) is not None]
    for name in peers:
        if name not in found:
            print(f"{name}: {PEERS[name].package} is not installed: pip install '.[peers]'", file=sys.stderr)
    if not found:
        raise UsageError(f"--peers {' '.join(peers)}: none of them is installed")
    return found


def load_side(name: str, request: Request) -> Side:
    """A loaded peer."""
    return importlib.import_module(f"benchmarks.{PEERS[name].module}").side(request, **PEERS[name].settings)


def sides_of(case: str, names: Sequence[str], request: Request) -> dict[str, Side]:
    """The peers that a case can have: one that stores one layer has no part in all, nor can all layers be cut."""
    is_all = case == "all"
    return {
        name: load_side(name, request) for name in names if not (is_all and (PEERS[name].one_layer or PEERS[name].cut))
    }


def check_agreement(ours: Path, side: Side, theirs: Path, request: Request, name: str) -> float:
    """Runs a peer once and compares it with what ours has written; returns the worst distance and clears up."""
    started = time.monotonic()
    side.run(theirs)
    print(f"{name}: a first run of {time.monotonic() - started:.1f} s", file=sys.stderr)
    distance = worst_disagreement(read_shards(ours), side.shards(theirs), request.layers, len(request.samples))
    shutil.rmtree(theirs)
    # Two roundings of nearly equal values to the stored dtype may differ by one unit in the last place.
    if not distance <= max(PEERS[name].tolerance, float(np.finfo(request.dtype).eps)):
        raise RunError(f"the activations differ from those of {name} by {distance:.2e}")
    return distance


def measure_case(
    case: str, names: Sequence[str], workload: Workload, folder: Path, args: argparse.Namespace
) -> CaseResult:
    """Runs all sides once untimed, compares what they wrote, then times them in turns.

    Raises RunError when the activations differ by more than the tolerance: then no time would mean anything.
    """
    request = request_of(case, workload, folder.parent / MODEL_FOLDER, args)
    engine = Engine.load(
        workload.model_path,
        workload.arc_stream,
        layers=request.layers,
        dtype=args.dtype,
        batch_size=args.batch_size,
        shard_mb=args.shard_mb,
    )
    sides = sides_of(case, names, request)
    cold = Timings()
    cold.run(lambda: engine.run(folder / "ours"))
    distances = {
        name: check_agreement(folder / "ours", side, folder / name, request, name) for name, side in sides.items()
    }
    shutil.rmtree(folder / "ours")
    runs: dict[str, Callable[[Path], object]] = {"ours": engine.run} | {name: side.run for name, side in sides.items()}
    timings = alternate({name: run_and_clear(run, folder / "timed") for name, run in runs.items()}, args.repeats)
    ours = timings["ours"]
    return CaseResult(
        case=case,
        layers=request.layers,
        tokens=workload.n_tokens,
        computed_tokens=sum(step.tokens.size for step in engine.planned_steps()),
        compilation_seconds=round(max(cold.seconds - ours.seconds, 0), 3),
        tokens_per_second=round(workload.n_tokens / ours.seconds, 1),
        peers=[peer_row(name, side, workload, timings, cold.seconds, distances[name]) for name, side in sides.items()],
        timings=timings,
    )


def request_of(case: str, workload: Workload, model_folder: Path, args: argparse.Namespace) -> Request:
    """What a case asks of every side."""
    config = load_config(workload.model_path)
    return Request(
        model_path=workload.model_path,
        model_folder=model_folder,
        samples=workload.samples,
        layers=case_layers(case, config.n_layers),
        d_model=config.d_model,
        dtype=np.dtype(args.dtype),
        batch_size=args.batch_size,
        shard_bytes=int(args.shard_mb * 2**20),
    )


def peer_row(
    name: str, side: Side, workload: Workload, timings: dict[str, Timings], cold_seconds: float, distance: float
) -> PeerRow:
    """The numbers of one peer; `cold_seconds` are those of our first run."""
    theirs = timings[name]
    return PeerRow(
        peer=name,
        computed_tokens=side.computed_tokens,
        tokens_per_second=round(workload.n_tokens / theirs.seconds, 1),
        ratio=Ratio.of(theirs, timings["ours"]),
        ratio_with_compilation=round(theirs.seconds / cold_seconds, 3),
        disagreement=distance,
    )


def few_of(workload: Workload, folder: Path, args: argparse.Namespace) -> Workload:
    """The prompts of which every layer is stored."""
    if args.all_prompts is None:
        return workload
    return build_workload(
        folder, prompts=args.all_prompts, seed=args.seed, source=args.source, model_path=args.model_path
    )


def run_and_clear(side: Callable[[Path], object], folder: Path) -> Callable[[], None]:
    """A run whose output is removed."""

    def timed() -> None:
        side(folder)
        shutil.rmtree(folder)

    return timed


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add_workload_flags(parser, prompts=24)
    add_case_flags(parser, dtypes=("float32", "float16"), repeats=3)
    add = parser.add_argument
    what = "; ".join(f"{name}: {peer.what}" for name, peer in PEERS.items())
    add("--peers", nargs="+", choices=tuple(PEERS), default=tuple(PEERS), help=f"{what} (default all)")
    add("--all_prompts", type=int, help="for every layer (default: as many as --prompts)")
    add("--shard_mb", type=float, default=1024.0, help="uncompressed size of a shard, both sides (default 1024)")
    add("--threads", type=int, help="of torch (default: all cores)")
    return parser


def report(results: Sequence[CaseResult]) -> str:
    """The table for people."""
    header = ["case", "peer", "tokens/s", "ours", "ratio (rounds)", "compiling too", "of CPU time", "distance"]
    rows = [
        [
            f"{result.case} ({len(result.layers)} layers)",
            PEERS[row.peer].what,
            f"{row.tokens_per_second:.0f}",
            f"{result.tokens_per_second:.0f}",
            row.ratio,
            f"{row.ratio_with_compilation:.2f}",
            f"{row.ratio.cpu:.2f}",
            f"{row.disagreement:.0e}",
        ]
        for result in results
        for row in result.peers
    ]
    return table(header, rows)


def verdicts(result: CaseResult) -> Iterator[str]:
    """Ours over the fastest peer in float32 and at any dtype, beside the targets; models cut by hand stand apart."""
    whole = {row.peer: row.ratio.median for row in result.peers if not PEERS[row.peer].cut}
    precise = {name: ratio for name, ratio in whole.items() if PEERS[name].is_float32}
    for what, ratios, target in zip(
        ("in float32", "at any dtype"), (precise, whole), TARGETS[result.case], strict=True
    ):
        if ratios:
            fastest = min(ratios, key=lambda name: ratios[name])
            ratio = ratios[fastest]
            verdict = "yes" if ratio >= target else "no"
            yield f"{result.case}: {ratio:.2f} times {fastest}, the fastest {what} (>= {target:.0f}: {verdict})"


def run(args: argparse.Namespace) -> None:
    """Measures the cases and prints them."""
    found: dict[str, Any] = {"machine": machine(), "targets": TARGETS}
    names = installed(args.peers)
    torch.set_num_threads(args.threads or found["machine"]["cores"])
    with tempfile.TemporaryDirectory(prefix="peers_") as scratch:
        workload = workload_of(args, Path(scratch))
        by_case = {"middle": workload, "all": few_of(workload, Path(scratch) / "few", args)}
        export_folder(workload.model_path, Path(scratch) / MODEL_FOLDER)
        results = [measure_case(case, names, by_case[case], Path(scratch) / case, args) for case in args.cases]
    if args.json:
        found |= {"workload": workload.spread(), "cases": [asdict(result) for result in results]}
        print(json.dumps(found))
        return
    print(report(results))
    for result in results:
        print("\n".join(verdicts(result)))
        note = f"{result.case}: {result.tokens} tokens, ours computes {result.computed_tokens} with padding"
        print(f"{note}; compilation {result.compilation_seconds:.1f} s", file=sys.stderr)


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
