"""The extraction step on a GPU: its MFU, the cost of copying to the host, and transformers for comparison.

Weights are random and made on the device, so no checkpoint and no hub are needed. See README.md for what is timed.
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
from benchmarks.gpu.step import DTYPE, OurSide, UniformBatch
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
# What a rehearsal uses instead of a published shape, a case and a GPU's peak.
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
# Limit on the relative distance between two bfloat16 sides, at the worst layer. An extra or missing layer gives several
# times as much.
TOLERANCE = 5e-2


@dataclass(frozen=True)
class TransformersSetting:
    """A setting of transformers. attention: None is the fastest that transformers itself has for the family."""

    attention: str | None
    compiled: bool

    def attention_of(self, config: DecoderConfig) -> str:
        """Its name in transformers, whose scaled_dot_product_attention has no soft-cap; flex_attention has one."""
        return self.attention or ("sdpa" if config.attn_softcap is None else "eager")

    @property
    def needs_flash(self) -> bool:
        """Whether it needs the package flash_attn."""
        return self.attention == FLASH


PEERS = {
    "own": TransformersSetting(None, False),
    "own_compiled": TransformersSetting(None, True),
    "flex_compiled": TransformersSetting("flex_attention", True),
    "flash": TransformersSetting(FLASH, False),
    "flash_compiled": TransformersSetting(FLASH, True),
}


@dataclass(frozen=True)
class SideResult:
    """A side's step, in medians over the rounds.

    Attributes:
      side: "ours", or one of PEERS with its attention in transformers.
      copied_step_seconds: with the output copied to the host during the next step.
      copy_share: share of the time with copies that they add.
      ratio, ratio_copied: its time over ours, in the same rounds.
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
class GpuResult:
    """One case. ours and peers are from the same rounds.

    Attributes:
      attention: block sizes that the kernel runs with; None: all logits at once.
      model_flops: of a step.
      copied_bytes: of a step; host_bytes_per_second: of a copy while nothing else runs.
    """

    case: str
    workload: UniformBatch
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
    """The flags that apply to every case.

    Attributes:
      tokens: per step; steps: per repetition; samples: per row.
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
        """The device's name in torch."""
        return "cpu" if self.is_rehearsal else "cuda"

    def fields(self, case: Case) -> dict[str, Any]:
        """The fields of the case's config.json."""
        return published_shapes()[case.model] | (TINY if self.is_rehearsal else {})

    def layers(self, case: Case, config: DecoderConfig) -> tuple[int, ...]:
        """The captured layers."""
        return TINY_LAYER if self.is_rehearsal and case.layers else case.layers_of(config)

    def workload(self, case: Case) -> UniformBatch:
        """As many rows as a step's tokens fill."""
        length = row_length(case, is_rehearsal=self.is_rehearsal)
        return UniformBatch(max(1, self.tokens // length), length, self.samples)


def row_length(case: Case, *, is_rehearsal: bool) -> int:
    """Tokens per row."""
    return TINY_LENGTHS[case.length] if is_rehearsal else case.length


class TimedSide(Protocol):
    """What is timed."""

    def forward(self, steps: int) -> None:
        """Runs `steps` steps, to the end of the last."""
        ...

    def extract(self, steps: int) -> None:
        """The same, and copies their outputs to the host."""
        ...

    def activations(self) -> np.ndarray:
        """The output of one step."""
        ...


def measure(case: Case, settings: Settings) -> GpuResult:
    """Times all sides alternately, with everything compiled and the weights in place.

    Raises RunError when the activations differ by more than TOLERANCE: then the times would mean nothing.
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
    return GpuResult(
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
    fields: Mapping[str, Any], ours: OurSide, workload: UniformBatch, layers: tuple[int, ...], settings: Settings
) -> Iterator[tuple[str, TimedSide]]:
    """Each side compiled, with host memory pinned. A peer that fails is left out with a message."""
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
        except Exception as error:  # whatever torch and its compilers raise: ours is measured anyway
            reason = " ".join(str(error).split())[:200]
            print(f"{name} ({attention}) is left out: {type(error).__name__}: {reason}", file=sys.stderr)
            continue
        yield f"{name} ({attention})", side


def _rounds(sides: Mapping[str, TimedSide], settings: Settings) -> dict[str, Timings]:
    calls: dict[str, Callable[[], object]] = {}
    for name, side in sides.items():
        calls[name] = partial(side.forward, settings.steps)
        calls[_copied(name)] = partial(side.extract, settings.steps)
    return alternate(calls, settings.repeats)


def _copied(name: str) -> str:
    return f"{name}, copied"


def _result(
    name: str, timings: Mapping[str, Timings], distance: float, flops: float, workload: UniformBatch, settings: Settings
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


def _tiles(config: DecoderConfig, workload: UniformBatch) -> Tiles | None:
    """The block sizes of the step's attention for a batch of this shape."""
    heads = config.n_kv_heads, config.n_heads // config.n_kv_heads
    q = jax.ShapeDtypeStruct((workload.rows, workload.length, *heads, config.head_dim), COMPUTE_DTYPES[DTYPE])
    return kernel_tiles(q, config.attn_softcap)


def _checked_distance(name: str, theirs: np.ndarray, ours: np.ndarray) -> float:
    """Distance at the worst layer over all tokens, relative to ours. theirs: (L, samples, T, D); ours: (L, B, T, D)."""
    ours = ours.reshape(len(ours), -1)
    off = np.linalg.norm(theirs.astype(np.float32).reshape(ours.shape) - ours, axis=1) / np.linalg.norm(ours, axis=1)
    worst = float(off.max())
    if not worst <= TOLERANCE:
        raise RunError(f"the activations differ from those of {name} by {worst:.2e}, more than {TOLERANCE:g}")
    return worst


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings for this machine. Raises RunError when there is no GPU, UsageError for an unknown one."""
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
    """The peers that can run here; prints which cannot, and why."""
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
    add("--steps", type=positive(int), default=20, help="steps per repetition (default 20)")
    add("--peers", nargs="*", choices=tuple(PEERS), default=tuple(PEERS), help="settings of transformers (default all)")
    add(
        "--peak_tflops",
        type=positive(float),
        help="dense bfloat16 TFLOP/s of the GPU; default from benchmarks/gpu/devices.py",
    )
    return parser


def report(results: Sequence[GpuResult]) -> str:
    """The printed tables: ours, then the peers."""
    header = ["case", "attention", "step", "MFU", "target", "tokens/s", "with copies", "copy share", "to host alone"]
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
    header_peers = ["case", "transformers", "MFU", "time over ours (rounds)", "with copies", "disagreement"]
    rows_peers = [
        [result.case, peer.side, f"{peer.mfu:.3f}", peer.ratio, peer.ratio_copied, f"{peer.disagreement:.1e}"]
        for result in results
        for peer in result.peers
    ]
    return "\n\n".join(table(*parts) for parts in ((header, rows), (header_peers, rows_peers)) if parts[1])


def _verdict(result: GpuResult) -> str:
    if result.target is None:
        return "none"
    return f">= {result.target:.2f}: {'yes' if result.ours.mfu >= result.target else 'no'}"


def run(args: argparse.Namespace) -> None:
    """Measures the cases and prints them."""
    # JAX must not reserve the memory of the whole device at its start, because torch needs some.
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
        print("a rehearsal: tiny models; the peak and the targets mean nothing", file=sys.stderr)


def main() -> None:
    """The console command."""
    run_command(run, build_parser)
