"""Ours and the libraries a user could take instead: same prompts, weights and stored arrays, tokens per second.

Every peer is in its own file, `peer_*.py`. A peer whose package is not installed is left out with a message. See
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

from benchmarks.common.cases import add_case_flags, case_layers
from benchmarks.common.engine import Engine
from benchmarks.common.measuring import Ratio, Timings, alternate, machine, table
from benchmarks.common.workload import Workload, add_workload_flags, build_workload, workload_of
from benchmarks.peers.agreement import read_shards, worst_disagreement
from benchmarks.peers.hf_model import export_folder
from benchmarks.peers.peer_sides import PeerSide, Request
from core.base.command_line import CommandParser, positive, run_command
from core.base.errors import RunError, UsageError
from core.jax_utils import COMPUTE_DTYPES
from qwen2_jax import load_config

# Limit on the relative distance of two sides if one computes in bfloat16.
BFLOAT16_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    Attributes:
      module: in this package, with a function `side`; package: must be installed.
      tolerance: limit on the relative distance of its activations from ours in float32.
      settings: further arguments of `side`.
      one_layer: whether it can store only one layer.
      cut: whether the user removed layers from the model by hand.
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
        """Whether it computes in float32."""
        return self.settings.get("dtype", torch.float32) is torch.float32


def _transformers(
    what: str, dtype: torch.dtype, *, is_sorted: bool = True, compiled: bool = False, cut: bool = False
) -> Peer:
    settings = {"dtype": dtype, "is_sorted": is_sorted, "compiled": compiled, "cut": cut}
    return Peer(what, "peer_transformers", "transformers", _tolerance(dtype), settings, cut=cut)


def _nnsight(what: str, dtype: torch.dtype) -> Peer:
    return Peer(what, "peer_nnsight", "nnsight", _tolerance(dtype), {"dtype": dtype})


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype is torch.float32 else BFLOAT16_TOLERANCE


PEERS = {
    "hf": _transformers("transformers, batches in stream order", torch.float32, is_sorted=False),
    "hf_sorted": _transformers("transformers, sorted by length", torch.float32),
    "hf_compiled": _transformers("transformers, sorted, torch.compile", torch.float32, compiled=True),
    "hf_bf16": _transformers("transformers, sorted, bfloat16", torch.bfloat16),
    "hf_bf16_compiled": _transformers("transformers, sorted, bfloat16, torch.compile", torch.bfloat16, compiled=True),
    "transformer_lens": Peer(
        "TransformerLens, sorted, stops after the layer", "peer_transformer_lens", "transformer_lens"
    ),
    "nnsight": _nnsight("nnsight, sorted, stops after the layer", torch.float32),
    "nnsight_bf16": _nnsight("nnsight, sorted, stops after the layer, bfloat16", torch.bfloat16),
    "sae_lens": Peer("SAELens' caching runner", "peer_sae_lens", "sae_lens", one_layer=True),
    "hf_cut": _transformers("transformers, sorted, later layers removed by hand", torch.float32, cut=True),
    "hf_bf16_cut": _transformers(
        "transformers, sorted, later layers removed by hand, bfloat16", torch.bfloat16, cut=True
    ),
}
MODEL_FOLDER = "model"
# Ours over the fastest peer: in float32, and at any dtype.
TARGETS = {"middle": (6.0, 3.0), "all": (4.0, 4.0)}


@dataclass(frozen=True)
class PeerRow:
    """One peer against ours in the same rounds; ratios and distances by our compute dtype."""

    peer: str
    computed_tokens: int
    tokens_per_second: float
    ratios: dict[str, Ratio]
    ratios_with_compilation: dict[str, float]
    disagreements: dict[str, float]


@dataclass(frozen=True)
class PeersResult:
    """One case; `tokens_per_second` are ours, by compute dtype.

    `compilation_seconds` is the time of our first run, in the first of these dtypes, minus the median time.
    """

    case: str
    layers: tuple[int, ...]
    tokens: int
    computed_tokens: int
    compilation_seconds: float
    tokens_per_second: dict[str, float]
    peers: list[PeerRow]
    timings: dict[str, Timings]


def installed(peers: Sequence[str]) -> list[str]:
    """The peers that can run; prints those that cannot. Raises UsageError when none can."""
    found = [name for name in peers if importlib.util.find_spec(PEERS[name].package) is not None]
    for name in peers:
        if name not in found:
            print(f"{name}: {PEERS[name].package} is not installed: pip install '.[peers]'", file=sys.stderr)
    if not found:
        raise UsageError(f"--peers {' '.join(peers)}: none of them is installed")
    return found


def load_side(name: str, request: Request) -> PeerSide:
    """A loaded peer."""
    return importlib.import_module(f"benchmarks.peers.{PEERS[name].module}").side(request, **PEERS[name].settings)


def sides_of(case: str, names: Sequence[str], request: Request) -> dict[str, PeerSide]:
    """The loaded peers of a case. With every layer, peers that store only one, and cut models, are left out."""
    is_all = case == "all"
    return {
        name: load_side(name, request) for name in names if not (is_all and (PEERS[name].one_layer or PEERS[name].cut))
    }


@dataclass(frozen=True)
class Ours:
    """Our engine computing in one dtype. `cold` is its first run, which compiles; `stored` is its output."""

    engine: Engine
    stored: Path
    cold: Timings

    @classmethod
    def first_run(
        cls, compute_dtype: str, request: Request, workload: Workload, folder: Path, shard_mb: float
    ) -> "Ours":
        """Loads the engine and runs it once."""
        engine = Engine.load(
            workload.model_path,
            workload.arc_stream,
            layers=request.layers,
            dtype=request.dtype.name,
            batch_size=request.batch_size,
            shard_mb=shard_mb,
            compute_dtype=compute_dtype,
        )
        ours = cls(engine, folder / f"ours_{compute_dtype}", Timings())
        ours.cold.run(lambda: engine.run(ours.stored))
        return ours


def check_agreement(
    ours: dict[str, Path], name: str, side: PeerSide, folder: Path, request: Request
) -> dict[str, float]:
    """Runs a peer once and compares it with our output in each compute dtype; returns the worst distances."""
    started = time.monotonic()
    side.run(folder / name)
    print(f"{name}: a first run of {time.monotonic() - started:.1f} s", file=sys.stderr)
    found = {}
    for dtype, written in ours.items():
        stored = read_shards(written), side.shards(folder / name)
        found[dtype] = worst_disagreement(*stored, request.layers, len(request.samples))
        tolerance = PEERS[name].tolerance if dtype == "float32" else BFLOAT16_TOLERANCE
        # Two roundings of nearly equal values to the stored dtype may differ by one unit in the last place.
        if not found[dtype] <= max(tolerance, float(np.finfo(request.dtype).eps)):
            raise RunError(f"the activations in {dtype} differ from those of {name} by {found[dtype]:.2e}")
    shutil.rmtree(folder / name)
    return found


def measure_case(
    case: str, names: Sequence[str], workload: Workload, folder: Path, args: argparse.Namespace
) -> PeersResult:
    """Runs all sides once untimed, compares their outputs, then times them alternately.

    Raises RunError when the activations differ by more than the tolerance: then the times would mean nothing.
    """
    request = request_of(case, workload, folder.parent / MODEL_FOLDER, args)
    ours = {dtype: Ours.first_run(dtype, request, workload, folder, args.shard_mb) for dtype in args.compute_dtypes}
    sides = sides_of(case, names, request)
    written = {dtype: ran.stored for dtype, ran in ours.items()}
    distances = {name: check_agreement(written, name, side, folder, request) for name, side in sides.items()}
    for stored in written.values():
        shutil.rmtree(stored)
    runs: dict[str, Callable[[Path], object]] = {_ours(dtype): ran.engine.run for dtype, ran in ours.items()}
    runs |= {name: side.run for name, side in sides.items()}
    timings = alternate({name: run_and_clear(run, folder / "timed") for name, run in runs.items()}, args.repeats)
    first = next(iter(ours.values()))
    warm = timings[_ours(args.compute_dtypes[0])].seconds
    return PeersResult(
        case=case,
        layers=request.layers,
        tokens=workload.n_tokens,
        computed_tokens=sum(step.tokens.size for step in first.engine.all_steps()),
        compilation_seconds=round(max(first.cold.seconds - warm, 0), 3),
        tokens_per_second={dtype: round(workload.n_tokens / timings[_ours(dtype)].seconds, 1) for dtype in ours},
        peers=[peer_row(name, side, workload, timings, ours, distances[name]) for name, side in sides.items()],
        timings=timings,
    )


def _ours(dtype: str) -> str:
    return f"ours, {dtype}"


def request_of(case: str, workload: Workload, model_folder: Path, args: argparse.Namespace) -> Request:
    """What every side computes in a case."""
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
    name: str,
    side: PeerSide,
    workload: Workload,
    timings: dict[str, Timings],
    ours: dict[str, Ours],
    distances: dict[str, float],
) -> PeerRow:
    """The numbers of one peer."""
    theirs = timings[name]
    return PeerRow(
        peer=name,
        computed_tokens=side.computed_tokens,
        tokens_per_second=round(workload.n_tokens / theirs.seconds, 1),
        ratios={dtype: Ratio.of(theirs, timings[_ours(dtype)]) for dtype in ours},
        ratios_with_compilation={dtype: round(theirs.seconds / ran.cold.seconds, 3) for dtype, ran in ours.items()},
        disagreements=distances,
    )


def few_of(workload: Workload, folder: Path, args: argparse.Namespace) -> Workload:
    """The prompts of the case that stores every layer."""
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
    add("--all_prompts", type=positive(int), help="prompts of the case with every layer (default: --prompts)")
    add(
        "--compute_dtypes",
        nargs="+",
        choices=tuple(COMPUTE_DTYPES),
        default=tuple(COMPUTE_DTYPES),
        help="our compute dtypes (default both)",
    )
    add(
        "--shard_mb",
        type=positive(float),
        default=1024.0,
        help="uncompressed size of a shard, both sides (default 1024)",
    )
    add("--threads", type=positive(int), help="torch threads (default: all cores)")
    return parser


def report(results: Sequence[PeersResult]) -> str:
    """The printed table."""
    header = [
        "case",
        "peer",
        "tokens/s",
        "ours",
        "tokens/s",
        "ratio (rounds)",
        "compiling too",
        "of CPU time",
        "distance",
    ]
    rows = [
        [
            f"{result.case} ({len(result.layers)} layers)",
            PEERS[row.peer].what,
            f"{row.tokens_per_second:.0f}",
            dtype,
            f"{result.tokens_per_second[dtype]:.0f}",
            ratio,
            f"{row.ratios_with_compilation[dtype]:.2f}",
            f"{ratio.cpu:.2f}",
            f"{row.disagreements[dtype]:.0e}",
        ]
        for result in results
        for row in result.peers
        for dtype, ratio in row.ratios.items()
    ]
    return table(header, rows)


def verdicts(result: PeersResult) -> Iterator[str]:
    """Ours over the fastest peer in float32 and at any dtype, and the targets; models cut by hand do not count."""
    whole = [row for row in result.peers if not PEERS[row.peer].cut]
    precise = [row for row in whole if PEERS[row.peer].is_float32]
    for dtype in result.tokens_per_second:
        for what, rows, target in zip(
            ("in float32", "at any dtype"), (precise, whole), TARGETS[result.case], strict=True
        ):
            if rows:
                fastest = min(rows, key=lambda row: row.ratios[dtype].median)
                ratio = fastest.ratios[dtype].median
                verdict = "yes" if ratio >= target else "no"
                yield (
                    f"{result.case}, ours in {dtype}: {ratio:.2f} times {fastest.peer}, the fastest {what} "
                    f"(>= {target:.0f}: {verdict})"
                )


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
