"""The extraction step on a GPU: how much of its peak, what copying costs, and transformers beside it.

Random weights made on the device: no checkpoint, no hub. See README.md for what is timed.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from absl.flags import argparse_flags

from benchmarks.common.measuring import Ratio, Timings, alternate, machine, table
from benchmarks.common.shapes import Case, published_shapes
from benchmarks.gpu.devices import add_gpu_flags, peak_tflops, require_gpu
from benchmarks.gpu.step import DTYPE, OurSide, Workload
from core.base.command_line import CommandParser, positive, run_command
from core.base.errors import RunError, UsageError
from core.jax_utils import COMPUTE_DTYPES
from core.pricing.model_flops import model_flops
from qwen2_jax import Capture, DecoderConfig
from qwen2_jax.attention import kernel_tiles
from qwen2_jax.attention.gpu_tiles import Tiles
from qwen2_jax.families import decoder_config

CASES = (
    Case("Qwen2.5-0.5B", None, 512, 0.45),
    Case("Qwen2.5-0.5B", None, 2048, 0.45),
    Case("Qwen2.5-7B", (13,), 512, 0.60),
    Case("Qwen2.5-7B", (13,), 2048, 0.60),
    Case("gemma-2-2b", (12,), 512),
    Case("gemma-2-2b", (12,), 2048),
)
MODELS = tuple(dict.fromkeys(case.model for case in CASES))
# What a rehearsal makes of a published shape, of a case and of a GPU's peak.
TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TINY_LENGTHS, TINY_LAYER, TINY_TOKENS, TINY_TFLOPS = {512: 128, 2048: 256}, (1,), 512, 1.0
FLASH = "flash_attention_2"
# Relative distance of bfloat16 from bfloat16, at the worst layer. A layer more or less is several times as far.
TOLERANCE = 5e-2


@dataclass(frozen=True)
class Peer:
    """A setting of transformers. attention: None is the fastest of its own that the family has."""

    attention: str | None
    compiled: bool

    def attention_of(self, config: DecoderConfig) -> str:
        """As transformers names it. Its scaled_dot_product_attention knows no soft-cap, its flex_attention does."""
        return self.attention or ("sdpa" if config.attn_softcap is None else "eager")

    @property
    def needs_flash(self) -> bool:
        """Whether it needs one more package."""
        return self.attention == FLASH


PEERS = {
    "own": Peer(None, False),
    "own_compiled": Peer(None, True),
    "flex_compiled": Peer("flex_attention", True),
    "flash": Peer(FLASH, False),
    "flash_compiled": Peer(FLASH, True),
}


@dataclass(frozen=True)
class SideResult:
    """A side's step, in medians over the rounds.

    Attributes:
      side: "ours", or one of PEERS with the attention it takes of transformers.
      copied_step_seconds: with what is captured brought to the host beside the next step.
      copy_share: of the time with copies, what they add.
      ratio, ratio_copied: how many times ours it takes, in the same rounds.
      disagreement: relative distance of its activations from ours, both in bfloat16, at the worst layer.
    """

    side: str
    step_seconds: float
    mfu: float
    tokens_per_second: float
    copied_step_seconds: float
    copied_tokens_per_second: float
    copy_share: float
    ratio: Ratio
    ratio_copied: Ratio
    disagreement: float


@dataclass(frozen=True)
class CaseResult:
    """One case. ours and peers are rounds of the same timings.

    Attributes:
      attention: the blocks that the kernel was found to run in; None: all logits at once.
      model_flops: of a step.
      copied_bytes: of a step; host_bytes_per_second: of a copy beside which nothing runs.
    """

    case: str
    workload: Workload
    target: float | None
    attention: Tiles | None
    model_flops: float
    copied_bytes: int
    host_bytes_per_second: float
    ours: SideResult
    peers: list[SideResult]
    timings: dict[str, Timings]


@dataclass(frozen=True)
class Settings:
    """What the flags say of every case.

    Attributes:
      tokens: of a step; steps: of a repetition; samples: of a row.
      peers: those that can run here.
    """

    device_kind: str
    peak_tflops: float
    tokens: int
    samples: int
    steps: int
    repeats: int
    peers: tuple[str, ...]
    is_rehearsal: bool

    @property
    def device(self) -> str:
        """As torch names it."""
        return "cpu" if self.is_rehearsal else "cuda"

    def fields(self, case: Case) -> dict[str, Any]:
        """Of the case's config.json."""
        return published_shapes()[case.model] | (TINY if self.is_rehearsal else {})

    def layers(self, case: Case, config: DecoderConfig) -> tuple[int, ...]:
        """Which are captured."""
        return TINY_LAYER if self.is_rehearsal and case.layers else case.layers_of(config)

    def workload(self, case: Case) -> Workload:
        """As many rows as hold a step's tokens."""
        length = row_length(case, is_rehearsal=self.is_rehearsal)
        return Workload(max(1, self.tokens // length), length, self.samples)


def row_length(case: Case, *, is_rehearsal: bool) -> int:
    """Tokens of its rows."""
    return TINY_LENGTHS[case.length] if is_rehearsal else case.length


class Side(Protocol):
    """What is timed."""

    def forward(self, steps: int) -> None:
        """So many steps, to the end of the last."""
        ...

    def extract(self, steps: int) -> None:
        """The same, and what they give is on the host."""
        ...

    def activations(self) -> np.ndarray:
        """Of one step."""
        ...


def measure(case: Case, settings: Settings) -> CaseResult:
    """All sides in turns, with everything compiled and the weights in place.

    Raises RunError when the activations differ by more than TOLERANCE: then no time would mean anything.
    """
    fields, workload = settings.fields(case), settings.workload(case)
    config = decoder_config(fields)
    layers = settings.layers(case, config)
    ours = OurSide.of(config, layers, workload)
    sides = dict(_warm_sides(fields, ours, workload, layers, settings))
    expected = np.asarray(ours.activations(), np.float32)
    distances = {name: _checked_distance(name, side.activations(), expected) for name, side in sides.items()}
    timings = _rounds(sides, settings)
    copies = [ours.copy() for _ in range(settings.repeats)]
    flops = model_flops(config, Capture(layers), workload.rows * workload.samples, workload.sample_length)
    results = [_result(name, timings, distances[name], flops, workload, settings) for name in sides]
    return CaseResult(
        case=case.name,
        workload=workload,
        target=case.target,
        attention=_tiles(config, workload),
        model_flops=flops,
        copied_bytes=copies[0][0],
        host_bytes_per_second=statistics.median(n_bytes / spent for n_bytes, spent in copies),
        ours=results[0],
        peers=results[1:],
        timings=timings,
    )


def _warm_sides(
    fields: Mapping[str, Any], ours: OurSide, workload: Workload, layers: tuple[int, ...], settings: Settings
) -> Iterator[tuple[str, Side]]:
    """Each compiled, with the host's memory pinned. A peer that fails is left out with a line."""
    ours.extract(2)
    yield "ours", ours
    if not settings.peers:
        return
    from benchmarks.gpu.transformers_side import TransformersSide, forget_other_cases

    forget_other_cases()
    tokens = ours.arrays.tokens.reshape(-1, workload.sample_length)
    for name in settings.peers:
        attention = PEERS[name].attention_of(ours.config)
        try:
            options: dict[str, Any] = {"attention": attention, "compiled": PEERS[name].compiled}
            side = TransformersSide(
                fields, ours.config, ours.parameters, tokens, layers, **options, device=settings.device
            )
            side.extract(2)
        except Exception as error:  # whatever torch and its compilers raise: ours is measured all the same
            reason = " ".join(str(error).split())[:200]
            print(f"{name} ({attention}) is left out: {type(error).__name__}: {reason}", file=sys.stderr)
            continue
        yield f"{name} ({attention})", side


def _rounds(sides: Mapping[str, Side], settings: Settings) -> dict[str, Timings]:
    calls: dict[str, Callable[[], object]] = {}
    for name, side in sides.items():
        calls[name] = partial(side.forward, settings.steps)
        calls[_copied(name)] = partial(side.extract, settings.steps)
    return alternate(calls, settings.repeats)


def _copied(name: str) -> str:
    return f"{name}, copied"


def _result(
    name: str, timings: Mapping[str, Timings], distance: float, flops: float, workload: Workload, settings: Settings
) -> SideResult:
    alone, copied = (statistics.median(timings[key].wall) / settings.steps for key in (name, _copied(name)))
    return SideResult(
        side=name,
        step_seconds=alone,
        mfu=flops / alone / (settings.peak_tflops * 1e12),
        tokens_per_second=workload.tokens / alone,
        copied_step_seconds=copied,
        copied_tokens_per_second=workload.tokens / copied,
        copy_share=max(0.0, 1 - alone / copied),
        ratio=Ratio.of(timings[name], timings["ours"]),
        ratio_copied=Ratio.of(timings[_copied(name)], timings[_copied("ours")]),
        disagreement=distance,
    )


def _tiles(config: DecoderConfig, workload: Workload) -> Tiles | None:
    """What the step's attention takes for a batch of this shape."""
    heads = config.n_kv_heads, config.n_heads // config.n_kv_heads
    q = jax.ShapeDtypeStruct((workload.rows, workload.length, *heads, config.head_dim), COMPUTE_DTYPES[DTYPE])
    return kernel_tiles(q, config.attn_softcap)


def _checked_distance(name: str, theirs: np.ndarray, ours: np.ndarray) -> float:
    """Of all tokens of the worst layer, relative to ours. theirs: (L, samples, T, D) where ours is (L, B, T, D)."""
    ours = ours.reshape(len(ours), -1)
    off = np.linalg.norm(theirs.astype(np.float32).reshape(ours.shape) - ours, axis=1) / np.linalg.norm(ours, axis=1)
    worst = float(off.max())
    if not worst <= TOLERANCE:
        raise RunError(f"the activations differ from those of {name} by {worst:.2e}, more than {TOLERANCE:g}")
    return worst


def settings_of(args: argparse.Namespace) -> Settings:
    """What the flags come to on this machine. Raises RunError where there is no GPU, UsageError for one not known."""
    kind = require_gpu(is_rehearsal=args.rehearse)
    shortest = min(row_length(case, is_rehearsal=args.rehearse) for case in CASES)
    if shortest % args.samples_per_row:
        raise UsageError(f"--samples_per_row {args.samples_per_row}: must be a power of two, at most {shortest}")
    known = TINY_TFLOPS if args.rehearse else None
    return Settings(
        device_kind=kind,
        peak_tflops=args.peak_tflops or known or peak_tflops(kind),
        tokens=TINY_TOKENS if args.rehearse else args.tokens,
        samples=args.samples_per_row,
        steps=args.steps,
        repeats=args.repeats,
        peers=runnable_peers(args.peers, is_rehearsal=args.rehearse),
        is_rehearsal=args.rehearse,
    )


def runnable_peers(names: Sequence[str], *, is_rehearsal: bool) -> tuple[str, ...]:
    """Those of the peers that can run here; says which cannot, and why."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if not missing and not is_rehearsal:
        import torch

        missing = [] if torch.cuda.is_available() else ["torch with CUDA"]
    if names and missing:
        print(f"transformers is left out: {' and '.join(missing)} not installed", file=sys.stderr)
        return ()
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if not has_flash and any(PEERS[name].needs_flash for name in names):
        print("flash attention is left out: flash_attn is not installed", file=sys.stderr)
    return tuple(name for name in names if has_flash or not PEERS[name].needs_flash)


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add_gpu_flags(parser, MODELS)
    add = parser.add_argument
    add("--steps", type=positive(int), default=20, help="of a repetition (default 20)")
    add("--peers", nargs="*", choices=tuple(PEERS), default=tuple(PEERS), help="settings of transformers (default all)")
    add(
        "--peak_tflops",
        type=positive(float),
        help="dense bfloat16 TFLOP/s of the GPU; default from benchmarks/gpu/devices.py",
    )
    return parser


def report(results: Sequence[CaseResult]) -> str:
    """The tables for people: ours, then the peers."""
    header = ["case", "attention", "step", "MFU", "target", "tokens/s", "with copies", "of it copying", "to host alone"]
    rows = [
        [
            result.case,
            "all logits" if result.attention is None else f"{result.attention.queries} x {result.attention.keys}",
            f"{1e3 * result.ours.step_seconds:.2f} ms",
            f"{result.ours.mfu:.3f}",
            _verdict(result),
            f"{result.ours.tokens_per_second:.0f}",
            f"{result.ours.copied_tokens_per_second:.0f}",
            f"{result.ours.copy_share:.0%}",
            f"{result.host_bytes_per_second / 1e9:.1f} GB/s",
        ]
        for result in results
    ]
    header_peers = ["case", "transformers", "MFU", "takes, times ours (rounds)", "with copies", "disagreement"]
    rows_peers = [
        [result.case, peer.side, f"{peer.mfu:.3f}", peer.ratio, peer.ratio_copied, f"{peer.disagreement:.1e}"]
        for result in results
        for peer in result.peers
    ]
    return "\n\n".join(table(*parts) for parts in ((header, rows), (header_peers, rows_peers)) if parts[1])


def _verdict(result: CaseResult) -> str:
    if result.target is None:
        return "none"
    return f">= {result.target:.2f}: {'yes' if result.ours.mfu >= result.target else 'no'}"


def run(args: argparse.Namespace) -> None:
    """Measures the cases and prints them."""
    # Where torch computes too, JAX must not take the memory of the whole device at its start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    settings = settings_of(args)
    results = [measure(case, settings) for case in CASES if case.model in args.models]
    if args.json:
        found = {"machine": machine(), "settings": asdict(settings), "cases": [asdict(result) for result in results]}
        print(json.dumps(found))
        return
    print(f"{settings.device_kind}, {settings.peak_tflops:.0f} TFLOP/s in bfloat16")
    print(report(results))
    if settings.is_rehearsal:
        print("a rehearsal: tiny models, and a peak and targets that mean nothing", file=sys.stderr)


def main() -> None:
    """The console command."""
    run_command(run, build_parser)
