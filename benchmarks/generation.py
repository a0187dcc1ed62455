"""Ours against an extractor that generates: transformers' `generate` with hooks, one token at a time. See README.md.

Both sides have the same model, prompts and layers. The engine runs the prompts, and also the prompts followed by what
was generated, so that both sides have the activations of exactly the same tokens.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl.flags import argparse_flags

from archived_old.generation_extractor import GenerationExtractor
from benchmarks.common.cases import add_case_flags, case_layers
from benchmarks.common.engine import Engine
from benchmarks.common.measuring import Ratio, Timings, alternate, machine, table
from benchmarks.common.workload import Workload, add_workload_flags, workload_of
from benchmarks.peers.agreement import read_shards, relative_distance
from benchmarks.peers.hf_model import load_causal_lm
from core.base.command_line import CommandParser, positive, run_command
from core.base.errors import RunError
from qwen2_jax import load_config

# A decoding step sums its matrix products in another order than a pass over the whole sequence.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class GenerationResult:
    """One case and number of new tokens.

    Attributes:
      prompt_tokens: of all prompts; seen_tokens: prompts and generated tokens, which is what the extractor stores.
      same_prompts: its time over ours for the prompts; same_tokens: over ours for all tokens that it stores.
    """

    case: str
    new_tokens: int
    prompt_tokens: int
    seen_tokens: int
    generation_tokens_per_second: float
    ours_tokens_per_second: float
    same_prompts: Ratio
    same_tokens: Ratio
    disagreement: float
    timings: dict[str, Timings]


def measure(case: str, new_tokens: int, workload: Workload, folder: Path, args: argparse.Namespace) -> GenerationResult:
    """Compares the activations of the same tokens, then times all sides alternately."""
    layers = case_layers(case, load_config(workload.model_path).n_layers)
    folder.mkdir(parents=True)
    extractor = GenerationExtractor(load_causal_lm(workload.model_path), list(layers))
    prompts = [(sample.sample_idx, sample.text_preview, sample.token_ids) for sample in workload.samples]
    shard = folder / "shard_0001.pkl.gz"
    seen = extractor.write_shard(prompts, new_tokens, shard)
    stream = write_tokens(folder / "seen.jsonl", seen)
    on_prompts, on_seen = (load_engine(workload, layers, path, args) for path in (workload.token_stream, stream))
    on_seen.run(folder / "ours")
    disagreement = worst_distance(folder / "ours", folder)
    if not disagreement <= TOLERANCE:
        raise RunError(f"the activations of the generated tokens differ by {disagreement:.2e}")
    on_prompts.run(folder / "prompts")
    sides: dict[str, Callable[[], object]] = {
        "generation": lambda: extractor.write_shard(prompts, new_tokens, shard),
        "prompts": lambda: run_and_clear(on_prompts, folder / "timed"),
        "seen": lambda: run_and_clear(on_seen, folder / "timed"),
    }
    timings = alternate(sides, args.repeats)
    n_seen = sum(map(len, seen))
    return GenerationResult(
        case=case,
        new_tokens=new_tokens,
        prompt_tokens=workload.n_tokens,
        seen_tokens=n_seen,
        generation_tokens_per_second=round(n_seen / timings["generation"].seconds, 1),
        ours_tokens_per_second=round(n_seen / timings["seen"].seconds, 1),
        same_prompts=Ratio.of(timings["generation"], timings["prompts"]),
        same_tokens=Ratio.of(timings["generation"], timings["seen"]),
        disagreement=disagreement,
        timings=timings,
    )


def load_engine(workload: Workload, layers: Sequence[int], stream: Path, args: argparse.Namespace) -> Engine:
    """Our engine for one stream."""
    return Engine.load(
        workload.model_path, stream, layers=layers, dtype=args.dtype, batch_size=args.batch_size, shard_mb=1024
    )


def run_and_clear(engine: Engine, folder: Path) -> None:
    """A run whose output is removed."""
    engine.run(folder)
    shutil.rmtree(folder)


def write_tokens(path: Path, sequences: Sequence[np.ndarray]) -> Path:
    """A stream of token ids."""
    path.write_text("".join(json.dumps({"input_ids": ids.tolist()}) + "\n" for ids in sequences))
    return path


def worst_distance(ours: Path, theirs: Path) -> float:
    """The largest relative L2 distance of any sample at any layer."""
    (expected,) = read_shards(theirs, recursive=False)
    worst = 0.0
    for shard in read_shards(ours):
        for layer, items in shard.items():
            for item in items:
                other = expected[layer][item["sample_idx"]]["activation"]
                worst = max(worst, relative_distance(item["activation"], other))
    return worst


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add_workload_flags(parser, prompts=4)
    add_case_flags(parser, dtypes=("float32", "float16"), repeats=3)
    parser.add_argument(
        "--new_tokens",
        type=positive(int),
        nargs="+",
        default=[16, 128],
        help="generated tokens at most (default 16 and 128)",
    )
    parser.add_argument("--threads", type=positive(int), help="torch threads (default: all cores)")
    return parser


def report(results: Sequence[GenerationResult]) -> str:
    """The printed table."""
    header = [
        "case",
        "new tokens",
        "generation tokens/s",
        "ours tokens/s",
        "same tokens (rounds)",
        "same prompts (rounds)",
    ]
    rows = [
        [
            result.case,
            f"<= {result.new_tokens} ({result.seen_tokens} stored of {result.prompt_tokens} prompted)",
            f"{result.generation_tokens_per_second:.0f}",
            f"{result.ours_tokens_per_second:.0f}",
            result.same_tokens,
            result.same_prompts,
        ]
        for result in results
    ]
    return table(header, rows)


def run(args: argparse.Namespace) -> None:
    """Measures and prints."""
    found: dict[str, Any] = {"machine": machine()}
    torch.set_num_threads(args.threads or found["machine"]["cores"])
    with tempfile.TemporaryDirectory(prefix="generation_") as scratch:
        workload = workload_of(args, Path(scratch))
        results = [
            measure(case, new_tokens, workload, Path(scratch) / f"{case}_{new_tokens}", args)
            for case in args.cases
            for new_tokens in args.new_tokens
        ]
    if args.json:
        print(json.dumps(found | {"workload": workload.spread(), "results": [asdict(result) for result in results]}))
        return
    print(report(results))
    print(f"worst relative distance {max(result.disagreement for result in results):.1e}", file=sys.stderr)


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
