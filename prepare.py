"""Writes the hidden states of a dataset's texts as Parquet files, a row a text. See docs/parquet_exporter.md.

In Python: `prepare(model_checkpoint, ds_repo, ds_input_column, output_dir, …)`.
"""

import argparse
import json
import sys
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from absl import logging

from core.base.arguments import checked_arguments, with_fields_of
from core.base.command_line import CommandParser, log_to_file, run_command
from parquet_cache.options import DEFAULT_BATCH_SIZE, PrepareOptions

if TYPE_CHECKING:
    from parquet_cache.export import PrepareSummary

_LEVELS = ("debug", "info", "warning", "error")


def build_parser() -> CommandParser:
    """The flags of the command, in groups; their defaults are those of `PrepareOptions`."""
    parser = CommandParser(description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    _add_dataset_flags(parser.add_argument_group("dataset"))
    _add_model_flags(parser.add_argument_group("model"))
    _add_output_flags(parser.add_argument_group("output"))
    return parser


def _add_dataset_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--ds_repo", required=True, help="hub id, file (.jsonl, .parquet, .txt), saved dataset or folder of data files")
    add("--ds_config", help="configuration of the dataset; ignored, with a warning, for a file or a saved dataset")
    add("--ds_split", help="split of the dataset (default train)")
    add("--ds_input_column", required=True, help="column with the texts")
    add("--ds_label_columns", nargs="+", metavar="COLUMN", help="columns that are stored beside the hidden states")
    add("--ds_filter", metavar="CONDITION", help="first: keep these rows alone, such as 'WhiteElo > 1800 and not Bot'")
    add("--deduplicate", action="store_true", help="then: keep the first row of each text")
    add("--ds_shuffle_seed", type=int, metavar="SEED", help="then: shuffle the rows; 0 is a seed too")
    add("--ds_sample", type=int, metavar="N", help="then: keep N of the rows, drawn at random")
    add("--sort_ds_by_len", action="store_true", help="last: sort by tokens, the shortest text first")
    add("--sort_ds_reversed", action="store_true", help="with --sort_ds_by_len: the longest text first")
    add("--max_bad_records", type=int, metavar="N", help="rows without a text to set aside (default 0)")


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model_checkpoint", required=True, help="hub id, Hugging Face folder or .gguf file")
    add("--revision", help="hub revision: a branch, tag or commit")
    add("--tokenizer_path", help="path of the tokenizer, if it is not with the model")
    add("--layers", type=int, nargs="+", metavar="LAYER", help="block numbers from 0 (default all)")
    add("--with_embedding", action="store_true", help="store what the first block reads as one more layer, the first")
    add("--n_pos", type=int, help="most tokens of a text; longer ones are truncated (default: all positions)")
    add("--batch_size", type=int, help=f"texts a batch (default {DEFAULT_BATCH_SIZE}); with the next flag the most")
    add("--auto_find_batch_size", action="store_true", help="by the compiler's memory analysis, then by trying")
    add("--device", choices=("auto", "cpu", "cuda", "tpu"), help="refused where there is none (default auto)")
    add("--backend", choices=("auto", "jax", "torch"), help="auto: JAX for the families it has, torch for any other")
    add("--compute_dtype", choices=("auto", "float32", "bfloat16"), help="auto: float32 on the CPU, else bfloat16")
    add("--trust_remote_code", action="store_true", help="run code that comes with a model; only with --backend torch")


def _add_output_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output_dir", required=True, help="folder or URL of the shards")
    add("--dtype", choices=("float16", "float32"), help="of the hidden states (default float16)")
    add("--batches_per_shard", type=int, help="batches of a shard (default 50)")
    add("--max_shards_created", type=int, metavar="N", help="stop after so many shards (default: all rows)")
    add("--log_file", default=None, help="also write the log to this file")
    add("--log_level", type=str.lower, choices=_LEVELS, default="info", help="least level to log (default info)")
    add("--json", action="store_true", default=False, help="print one JSON object with the result on stdout")
    add("--verbose", action="store_true", default=False, help="debug messages, and stack traces of errors")


@with_fields_of(PrepareOptions)
def prepare(
    model_checkpoint: str, ds_repo: str, ds_input_column: str, output_dir: str, **options: Any
) -> "PrepareSummary":
    """Writes the hidden states of a dataset's texts as Parquet shards; an interrupted call is continued by the same.

    Args:
      model_checkpoint: a Hugging Face folder, hub id or .gguf file.
      ds_repo: a hub id, a file, a saved dataset or a folder of data files.
      ds_input_column: the column with the texts.
      output_dir: folder or URL of the shards.
      options: the other fields of `parquet_cache.options.PrepareOptions`, which are the flags of the command.

    Raises UsageError for invalid options or a folder made with others, ModelError for the model, RunError for data,
    disk and storage.
    """
    named = {"model_checkpoint": model_checkpoint, "ds_repo": ds_repo}
    named |= {"ds_input_column": ds_input_column, "output_dir": output_dir}
    checked = PrepareOptions(**checked_arguments(PrepareOptions, named | options))
    from parquet_cache import export

    return export.prepare(checked)


def run_flags(args: argparse.Namespace) -> None:
    """The command: logs go to stderr, the JSON object of --json to stdout."""
    if not args.verbose:
        logging.set_verbosity(args.log_level)
    log_to_file(args.log_file)
    known = {field.name for field in fields(PrepareOptions)}
    summary = prepare(**{name: value for name, value in vars(args).items() if name in known})
    print(
        f"{summary.output}: {summary.shards} shards, {summary.written} of them new, {summary.texts} texts, "
        f"{summary.tokens} tokens in {summary.seconds:.1f} s",
        file=sys.stderr,
    )
    if args.json:
        print(json.dumps(asdict(summary)))


def main() -> None:
    """The console command."""
    run_command(run_flags, build_parser)


if __name__ == "__main__":
    main()
