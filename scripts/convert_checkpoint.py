"""Converts a model's weights once, so that later runs start faster; see docs/loading.md."""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

from absl import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.base.command_line import CommandParser, run_command
from core.run.config import RunConfig


def build_parser() -> CommandParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("model", help="HF folder, .gguf file, hub id or gs:// folder")
    add("--revision", help="hub revision: a branch, tag or commit")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="the --compute_dtype of later runs")
    add("--weights_cache_dir", default=RunConfig.weights_cache_dir, help="local or gs:// (default %(default)s)")
    add("--json", action="store_true", help="print one JSON object on stdout at the end")
    add("--verbose", action="store_true", help="debug messages, and stack traces of errors")
    return parser


def run(args: argparse.Namespace) -> None:
    """Writes the cache and logs where it is."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # weights are only cast and stored, which needs no accelerator
    from qwen2_jax.checkpoints.loading import convert_weights

    if not args.verbose:
        logging.set_verbosity(logging.WARNING)  # Orbax logs every step
    started = time.monotonic()
    converted = convert_weights(args.model, args.weights_cache_dir, dtype=args.dtype, revision=args.revision)
    seconds = round(time.monotonic() - started, 3)
    logging.set_verbosity(logging.INFO)
    if converted.bytes:
        logging.info("%s: %.3f GB written in %.1f s", converted.url, converted.bytes / 1e9, seconds)
    else:
        logging.info("%s: exists already", converted.url)
    if args.json:
        print(json.dumps(dataclasses.asdict(converted) | {"seconds": seconds}))


if __name__ == "__main__":
    run_command(run, build_parser)
