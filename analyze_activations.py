"""Works on committed shards: verify. See README.md."""

import argparse
import json

from absl import logging
from absl.flags import argparse_flags

from core.command_line import run_command


def build_parser() -> argparse_flags.ArgumentParser:
    """One subcommand for each job on shards."""
    parser = argparse_flags.ArgumentParser(description=__doc__)
    parser.set_defaults(verbose=False)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("verify", help="check every committed shard; exit code 0 when all is well, else 1")
    check.add_argument("dir", help="the output folder, local or gs://, or one worker's folder in it")
    check.add_argument("--allow_unfinished", action="store_true", help="a run that is not at its end yet is no problem")
    check.set_defaults(run=verify_command)
    for command in (check,):
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        command.add_argument("--verbose", action="store_true", help="debug messages, and stack traces of errors")
    return parser


def verify_command(args: argparse.Namespace) -> int:
    """Prints what is wrong with the shards of a run; returns 0 when nothing is."""
    from analysis.verification import verify

    report = verify(args.dir, allow_unfinished=args.allow_unfinished)
    for line in report.lines():
        logging.info(line)
    if args.json:
        print(json.dumps(report.to_json()))
    return 0 if report.ok else 1


def main() -> None:
    """The console script."""
    run_command(lambda args: args.run(args), build_parser)


if __name__ == "__main__":
    main()
