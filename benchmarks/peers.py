"""Side by side with transformers: the same prompts and weights, float32, the same shards, tokens a second.

The peer is what a competent user writes in twenty lines: `output_hidden_states=True` under `torch.no_grad`, batches
padded on the right, `gzip.open` and `pickle.dump`. See README.md for what is timed.
"""

import argparse
import gzip
import json
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl.flags import argparse_flags
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from benchmarks.engine import Engine
from benchmarks.measuring import Ratio, Timings, alternate, machine, table
from benchmarks.utilisation import CASES, middle_layer
from benchmarks.workload import Workload, add_workload_flags, workload_of
from core.command_line import run_command
from core.errors import RunError
from core.windows import TokenizedSample
from qwen2_jax import load_config

TARGETS = {"all": 4.0, "middle": 7.0}
TOLERANCE = 1e-4
# Writes one side's shards below a folder.
Side = Callable[[Path], object]
SETTINGS = {
    "stream": "batches in stream order",
    "sorted": "batches of prompts sorted by length, its best simple setting",
    "causal_lm": "batches in stream order, with AutoModelForCausalLM, which also computes logits",
}


@dataclass(frozen=True)
class Peer:
    """transformers as a user would run it over token ids that are there already."""

    model: PreTrainedModel
    layers: tuple[int, ...]
    dtype: np.dtype
    batch_size: int
    shard_bytes: int

    def run(self, samples: Sequence[TokenizedSample], folder: Path) -> None:
        """Writes shard_0001.pkl.gz … with the samples in the order given."""
        folder.mkdir(parents=True)
        shard: dict[int, list[dict[str, Any]]] = {layer: [] for layer in self.layers}
        n_bytes = n_shards = 0
        for start in range(0, len(samples), self.batch_size):
            batch = samples[start : start + self.batch_size]
            hidden_states = self._forward(batch)
            for layer in self.layers:
                for row, sample in enumerate(batch):
                    # Copied, or the pickle would be fine but every padded batch would stay in memory.
                    activation = hidden_states[layer + 1][row, : len(sample.token_ids)].numpy().astype(self.dtype)
                    shard[layer].append(
                        {
                            "sample_idx": sample.sample_idx,
                            "activation": activation,
                            "shape": activation.shape,
                            "text_preview": sample.text_preview,
                        }
                    )
                    n_bytes += activation.nbytes
            if n_bytes >= self.shard_bytes or start + self.batch_size >= len(samples):
                n_shards += 1
                with gzip.open(folder / f"shard_{n_shards:04d}.pkl.gz", "wb") as file:
                    pickle.dump(shard, file)
                shard, n_bytes = {layer: [] for layer in self.layers}, 0

    def _forward(self, batch: Sequence[TokenizedSample]) -> tuple[torch.Tensor, ...]:
        longest = max(len(sample.token_ids) for sample in batch)
        tokens, mask = (torch.zeros(len(batch), longest, dtype=torch.long) for _ in range(2))
        for row, sample in enumerate(batch):
            tokens[row, : len(sample.token_ids)] = torch.as_tensor(sample.token_ids)
            mask[row, : len(sample.token_ids)] = 1
        with torch.no_grad():
            return self.model(tokens, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states


def load_peer(model_path: str) -> PreTrainedModel:
    """The model in float32 as transformers itself reads it, GGUF or folder, with its default attention.

    The final norm becomes the identity: transformers puts it into its last hidden state, and layer 29 would not be the
    residual stream. That takes nothing from the peer but the time of one norm.
    """
    path = Path(model_path)
    if path.suffix != ".gguf":
        causal_lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        # from_pretrained(gguf_file=…) asks for one more package; its parts do the same without.
        causal_lm = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(path.parent, gguf_file=path.name), dtype=torch.float32
        )
        tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=causal_lm)["tensors"]
        found = causal_lm.load_state_dict(tensors, strict=False)
        if found.unexpected_keys or set(found.missing_keys) - {"lm_head.weight"}:
            raise RunError(f"{path}: transformers reads other weights than the model has: {found}")
        causal_lm.tie_weights()
    causal_lm.model.norm = torch.nn.Identity()
    return causal_lm.eval()


def read_shards(folder: Path) -> Iterator[dict[int, list[dict[str, Any]]]]:
    """The shards of one side, which this process has just written."""
    for path in sorted(folder.rglob("shard_*.pkl.gz")):
        with gzip.open(path) as file:
            yield pickle.load(file)


def worst_disagreement(ours: Path, theirs: Path, layers: Sequence[int], n_samples: int) -> float:
    """The largest relative L2 distance of any sample at any layer.

    Raises RunError when a sample is missing, there twice, or differs in shape or preview.
    """
    expected = {
        (layer, item["sample_idx"]): item for shard in read_shards(theirs) for layer in shard for item in shard[layer]
    }
    seen, worst = set(), 0.0
    for shard in read_shards(ours):
        for layer, items in shard.items():
            for item in items:
                key = (layer, item["sample_idx"])
                other = expected.get(key)
                if other is None or key in seen or any(item[name] != other[name] for name in ("shape", "text_preview")):
                    raise RunError(f"layer {layer}, sample_idx {item['sample_idx']}: the two sides hold other samples")
                seen.add(key)
                worst = max(worst, relative_distance(item["activation"], other["activation"]))
    if len(seen) != len(layers) * n_samples or len(expected) != len(seen):
        raise RunError(f"{len(seen)} and {len(expected)} activations where {len(layers) * n_samples} were asked for")
    return worst


def relative_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Over the whole sample, in float64."""
    exact = theirs.astype(np.float64)
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


@dataclass(frozen=True)
class PeerRow:
    """One setting of the peer against ours in the same rounds."""

    setting: str
    computed_tokens: int
    tokens_per_second: float
    ratio: Ratio
    ratio_with_compilation: float


@dataclass(frozen=True)
class CaseResult:
    """One case. `compilation_seconds` is what our first run took more than the median one."""

    case: str
    layers: tuple[int, ...]
    tokens: int
    computed_tokens: int
    disagreement: float
    compilation_seconds: float
    tokens_per_second: float
    peers: list[PeerRow]
    timings: dict[str, Timings]


def peer_sides(args: argparse.Namespace, workload: Workload, layers: Sequence[int]) -> dict[str, Side]:
    """Each setting as a function of the folder it writes to."""
    causal_lm = load_peer(workload.model_path)
    in_order = list(workload.samples)
    by_length = sorted(in_order, key=lambda sample: len(sample.token_ids))
    model = causal_lm.model
    runs = {"stream": (model, in_order), "sorted": (model, by_length), "causal_lm": (causal_lm, in_order)}

    def side(setting: str) -> Side:
        model, samples = runs[setting]
        peer = Peer(model, tuple(layers), np.dtype(args.dtype), args.batch_size, int(args.shard_mb * 2**20))
        return lambda folder: peer.run(samples, folder)

    return {setting: side(setting) for setting in args.peer_settings}


def padded_tokens(lengths: Sequence[int], batch_size: int) -> int:
    """Tokens that batches of these lengths compute, padding included."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return sum(len(batch) * max(batch) for batch in batches)


def measure_case(case: str, workload: Workload, folder: Path, args: argparse.Namespace) -> CaseResult:
    """Runs all sides once untimed, compares what they wrote, then times them in turns.

    Raises RunError when the activations differ by more than the tolerance: then no time would mean anything.
    """
    n_layers = load_config(workload.model_path).n_layers
    layers = tuple(range(n_layers)) if case == "all" else (middle_layer(n_layers),)
    engine = Engine.load(
        workload.model_path,
        workload.arc_stream,
        layers=layers,
        dtype=args.dtype,
        batch_size=args.batch_size,
        shard_mb=args.shard_mb,
    )
    sides: dict[str, Side] = {"ours": engine.run, **peer_sides(args, workload, layers)}
    cold = Timings()
    cold.run(lambda: sides["ours"](folder / "ours"))
    disagreement = check_agreement(sides, folder, layers, len(workload.samples), args.dtype)

    def timed(side: Side) -> Callable[[], None]:
        def run_and_clear() -> None:
            side(folder / "timed")
            shutil.rmtree(folder / "timed")

        return run_and_clear

    timings = alternate({name: timed(side) for name, side in sides.items()}, args.repeats)
    ours = timings["ours"]
    return CaseResult(
        case=case,
        layers=layers,
        tokens=workload.n_tokens,
        computed_tokens=sum(step.tokens.size for step in engine.planned_steps()),
        disagreement=disagreement,
        compilation_seconds=round(max(cold.seconds - ours.seconds, 0), 3),
        tokens_per_second=round(workload.n_tokens / ours.seconds, 1),
        peers=[peer_row(setting, workload, timings, cold.seconds, args.batch_size) for setting in args.peer_settings],
        timings=timings,
    )


def check_agreement(sides: dict[str, Side], folder: Path, layers: Sequence[int], n_samples: int, dtype: str) -> float:
    """Runs every peer once and compares it with what ours has written to `folder`; returns the worst distance."""
    worst = 0.0
    # Two float16 roundings of nearly equal values may differ by one unit in the last place.
    tolerance = TOLERANCE if dtype == "float32" else max(TOLERANCE, float(np.finfo(dtype).eps))
    for setting in sides.keys() - {"ours"}:
        sides[setting](folder / setting)
        distance = worst_disagreement(folder / "ours", folder / setting, layers, n_samples)
        shutil.rmtree(folder / setting)
        if not distance <= tolerance:
            raise RunError(f"the activations differ from those of transformers ({setting}) by {distance:.2e}")
        worst = max(worst, distance)
    shutil.rmtree(folder / "ours")
    return worst


def peer_row(
    setting: str, workload: Workload, timings: dict[str, Timings], cold_seconds: float, batch_size: int
) -> PeerRow:
    """The numbers of one setting."""
    theirs = timings[setting]
    lengths = sorted(workload.lengths) if setting == "sorted" else workload.lengths
    return PeerRow(
        setting=setting,
        computed_tokens=padded_tokens(lengths, batch_size),
        tokens_per_second=round(workload.n_tokens / theirs.seconds, 1),
        ratio=Ratio.of(theirs, timings["ours"]),
        ratio_with_compilation=round(theirs.seconds / cold_seconds, 3),
    )


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = argparse_flags.ArgumentParser(description=__doc__)
    add_workload_flags(parser, prompts=24)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=CASES, help="one middle layer, every layer (default both)")
    settings = "; ".join(f"{name}: {what}" for name, what in SETTINGS.items())
    add("--peer_settings", nargs="+", choices=tuple(SETTINGS), default=["stream", "sorted"], help=settings)
    add("--batch_size", type=int, default=4, help="of both sides (default 4)")
    add("--shard_mb", type=float, default=1024.0, help="uncompressed size of a shard, both sides (default 1024)")
    add("--dtype", choices=("float32", "float16"), default="float32", help="stored by both sides (default float32)")
    add("--threads", type=int, help="of torch (default: all cores)")
    add("--repeats", type=int, default=3, help="of each side (default 3)")
    add("--json", action="store_true", help="print one JSON object on stdout instead of the table")
    return parser


def report(results: Sequence[CaseResult]) -> str:
    """The table for people."""
    header = [
        "case",
        "peer",
        "peer tokens/s",
        "ours tokens/s",
        "ratio (rounds)",
        "target",
        "compiling too",
        "of CPU time",
    ]
    rows = [
        [
            f"{result.case} ({len(result.layers)} layers)",
            row.setting,
            f"{row.tokens_per_second:.0f}",
            f"{result.tokens_per_second:.0f}",
            row.ratio,
            f">= {TARGETS[result.case]:.0f}: {'yes' if row.ratio.median >= TARGETS[result.case] else 'no'}",
            f"{row.ratio_with_compilation:.2f}",
            f"{row.ratio.cpu:.2f}",
        ]
        for result in results
        for row in result.peers
    ]
    return table(header, rows)


def run(args: argparse.Namespace) -> None:
    """Measures the cases and prints them."""
    found: dict[str, Any] = {"machine": machine(), "targets": TARGETS}
    torch.set_num_threads(args.threads or found["machine"]["cores"])
    with tempfile.TemporaryDirectory(prefix="peers_") as scratch:
        workload = workload_of(args, Path(scratch))
        results = [measure_case(case, workload, Path(scratch) / case, args) for case in args.cases]
    if args.json:
        found |= {"workload": workload.spread(), "cases": [asdict(result) for result in results]}
        print(json.dumps(found))
        return
    print(report(results))
    for result in results:
        print(
            f"{result.case}: {result.tokens} tokens, ours computes {result.computed_tokens} with padding, "
            + ", ".join(f"{row.setting} {row.computed_tokens}" for row in result.peers)
            + f"; worst relative distance {result.disagreement:.1e}; compilation {result.compilation_seconds:.1f} s",
            file=sys.stderr,
        )


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
