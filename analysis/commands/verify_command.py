"""`analyze_activations.py verify`."""

import argparse

from analysis.commands.functions import verify
from analysis.commands.pass_flags import add_pass_flags, options_of, print_report


def add_verify(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Its flags."""
    parser = commands.add_parser(
        "verify", help="check every committed shard; exit code 0 when nothing is wrong, else 1"
    )
    parser.add_argument("dir", help="the output folder, local or gs://, or one worker's folder in it")
    parser.add_argument("--allow_unfinished", action="store_true", help="an unfinished run is not a problem")
    add_pass_flags(parser, partials="none; two threads read")
    parser.set_defaults(run=verify_command)
    return parser


def verify_command(args: argparse.Namespace) -> int:
    """Prints the problems of a run's shards; returns 0 when there are none."""
    report = verify(args.dir, allow_unfinished=args.allow_unfinished, **options_of(args))
    print_report(report, args)
    return 0 if report.ok else 1
