"""Flags that all commands on committed shards share."""

import argparse
import json
from typing import Any, Protocol

from absl import logging

from analysis.passes.runners import RUNNERS
from core.base.command_line import positive

OPTIONS = ("runner", "workers", "ray_address", "partials", "keep_partials")


class Report(Protocol):
    """What a command prints."""

    def lines(self) -> list[str]: ...

    def to_json(self) -> dict[str, Any]: ...


def add_pass_flags(parser: argparse.ArgumentParser, *, partials: str) -> None:
    """The flags of `PassOptions`. partials: the default folder, for the help."""
    parser.add_argument(
        "--runner", choices=RUNNERS, help="where shards are read (default: here, or processes with --workers)"
    )
    parser.add_argument("--workers", type=positive(int), metavar="N", help="threads, processes or Ray tasks at once")
    parser.add_argument("--ray_address", metavar="ADDRESS", help="of a Ray cluster, such as auto; implies --runner ray")
    parser.add_argument(
        "--partials",
        metavar="FOLDER",
        help=f"for partial results, from which an interrupted command goes on; none: nowhere (default {partials})",
    )
    parser.add_argument(
        "--keep_partials", action="store_true", help="leave them at the end, for an output that has grown by then"
    )


def add_token_flags(parser: argparse.ArgumentParser) -> None:
    """Which tokens count."""
    parser.add_argument(
        "--drop",
        nargs="+",
        metavar="RULE",
        help="tokens that do not count: first (position 0), START:STOP, a token id, or with --tokenizer "
        "bos, pad, eos, special; none: all count (default first, and bos with --tokenizer)",
    )
    parser.add_argument("--tokenizer", metavar="MODEL", help="HF folder or hub id, for kinds of tokens")


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The pass flags, as keyword arguments of the functions."""
    return {name: getattr(args, name) for name in OPTIONS}


def print_report(report: Report, args: argparse.Namespace) -> None:
    """Lines for people on stderr, and with --json one object on stdout."""
    for line in report.lines():
        logging.info("%s", line)
    if args.json:
        print(json.dumps(report.to_json()))
