"""The flags of `analyze_activations.py mean`, `mean compare` and `mean export`."""

import argparse
import json
from dataclasses import fields

from absl import logging

from analysis.mean_vectors.commands import FORMATS, mean, mean_compare, mean_export
from analysis.mean_vectors.modes import MODES, POOLS
from analysis.mean_vectors.options import MeanOptions
from analysis.mean_vectors.stored.names import ARRAYS
from core.backends import BACKENDS
from core.base.command_line import CommandParser, not_negative, positive

_TEXTS = ("num_samples", "seed", "column", "split", "config", "text_unit")


def add_mean(commands: argparse._SubParsersAction) -> list[argparse.ArgumentParser]:
    """Adds the three commands and returns their parsers. `mean compare` is one of them: see `longer_commands`."""
    job: CommandParser = commands.add_parser("mean", help="mean of the pooled vectors of texts, with standard errors")
    compare: CommandParser = commands.add_parser("mean compare", help="cosines of texts or vectors with a mean vector")
    export: CommandParser = commands.add_parser("mean export", help="mean vectors as safetensors, npy or pt")
    job.longer_commands = {"compare": compare, "export": export}
    _add_job(job)
    _add_compare(compare)
    _add_export(export)
    return [job, compare, export]


def _add_job(parser: CommandParser) -> None:
    add = parser.add_argument
    add("data", nargs="+", help="a pickled list of texts, JSON Lines (.gz, .zst), text, Parquet or a saved dataset")
    _add_model(parser, required=True)
    add("--output", required=True, help="the folder of vectors and means, local or gs://")
    add("--layers", type=int, nargs="+", metavar="LAYER", help="averaged layers (default 25 26 27 for Pythia-12B)")
    add("--mode", choices=MODES, default=MeanOptions.mode, help="which vectors (default short)")
    add("--batch_size", type=positive(int), default=200, metavar="N", help="texts in a file of vectors (default 200)")
    add("--rows_per_step", type=positive(int), default=4, metavar="N", help="rows of a device's step (default 4)")
    add("--max_seq_length", type=positive(int), metavar="N", help="tokens of a text at most (default 2048, or fewer)")
    add("--overlong", choices=("truncate", "refuse"), default="truncate", help="longer texts (default truncate)")
    add("--max_failed", type=not_negative(int), metavar="N", help="stop after more failed texts (default never)")
    add("--overwrite", action="store_true", help="delete the vectors and means in the folder first")
    add("--backend", choices=BACKENDS, default="auto", help="as of extract_activations.py (default auto)")
    add("--compute_dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="dtype of the model")
    _add_texts(parser)
    parser.set_defaults(run=mean_command)


def _add_compare(parser: CommandParser) -> None:
    add = parser.add_argument
    add("folder", help="an output folder of mean")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--texts", nargs="+", metavar="SOURCE", help="texts, through the model of the mean")
    what.add_argument("--vectors", metavar="FOLDER", help="the stored vectors of an output folder of mean")
    what.add_argument("--other", metavar="FOLDER", help="the mean of another output folder")
    _add_model(parser, required=False)
    add("--mode", choices=tuple(POOLS), help="which mean (default the only one)")
    _add_texts(parser)
    parser.set_defaults(run=compare_command)


def _add_export(parser: CommandParser) -> None:
    add = parser.add_argument
    add("folder", help="an output folder of mean")
    add("--to", choices=FORMATS, required=True, help="the format")
    add("--output", required=True, metavar="FILE", help="the file, local or gs://; an existing one stays")
    add("--mode", choices=tuple(POOLS), help="which mean (default all; npy holds one)")
    add("--array", choices=ARRAYS, default="mean", help="what an npy file holds (default mean)")
    parser.set_defaults(run=export_command)


def _add_model(parser: CommandParser, *, required: bool) -> None:
    where = "" if required else " (default where the mean was made)"
    add = parser.add_argument
    add("--model_path", required=required, help=f"HF folder, .gguf file or hub id{where}")
    add("--revision", help="hub revision: a branch, tag or commit")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")


def _add_texts(parser: CommandParser) -> None:
    add = parser.add_argument
    add("--num_samples", type=positive(int), metavar="N", help="the first N texts (default all)")
    add("--seed", type=int, metavar="N", help="a random choice of --num_samples texts instead of the first")
    add("--column", default="text", help="the column of the texts (default text)")
    add("--split", default="train", help="the split of a dataset (default train)")
    add("--config", help="the configuration of a Hugging Face dataset")
    add("--text_unit", choices=("line", "paragraph", "file"), default="line", help="a text of a text file (line)")


def mean_command(args: argparse.Namespace) -> None:
    """Computes a mean and prints its summary; with --json as one object."""
    given = {field.name: getattr(args, field.name) for field in fields(MeanOptions)}
    summary = mean(**given, quiet=False)
    for line in summary.lines():
        logging.info("%s", line)
    if args.json:
        print(json.dumps(summary.to_json()))


def compare_command(args: argparse.Namespace) -> None:
    """Prints the cosines; with --json as one object."""
    options = {name: getattr(args, name) for name in (*_TEXTS, "trust_remote_code")}
    if args.model_path:
        options |= {"model_path": args.model_path, "revision": args.revision}
    found = mean_compare(
        args.folder, texts=args.texts, vectors=args.vectors, other=args.other, mode=args.mode, **options
    )
    print(json.dumps(found.to_json()) if args.json else "\n".join(found.lines()))


def export_command(args: argparse.Namespace) -> None:
    """Writes the file and says what is in it."""
    names = mean_export(args.folder, args.to, args.output, mode=args.mode, array=args.array)
    logging.info("%s: %s", args.output, ", ".join(names))
    if args.json:
        print(json.dumps({"output": args.output, "arrays": list(names)}))
