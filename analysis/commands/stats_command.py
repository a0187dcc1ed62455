"""`analyze_activations.py stats`."""

import argparse

from analysis.commands.functions import stats
from analysis.commands.pass_flags import add_pass_flags, add_token_flags, options_of, print_report


def add_stats(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Its flags."""
    parser = commands.add_parser(
        "stats", help="mean, covariance, norms, massive activations and outlier dimensions, by site and layer"
    )
    parser.add_argument("dir", help="the output folder, local or gs://, or one worker's folder in it")
    parser.add_argument(
        "--layer", type=int, nargs="+", metavar="LAYER", help="only these (default all that are stored)"
    )
    parser.add_argument("--site", nargs="+", metavar="SITE", help="only these (default all that are stored)")
    parser.add_argument("--output", metavar="FILE", help="stats.npz: the arrays; created once")
    add_token_flags(parser)
    add_pass_flags(parser, partials="DIR/analysis")
    parser.set_defaults(run=stats_command)
    return parser


def stats_command(args: argparse.Namespace) -> None:
    """Prints a table and what stands out, or with --json one object."""
    names = ("layer", "site", "drop", "tokenizer", "output")
    report = stats(args.dir, **{name: getattr(args, name) for name in names}, **options_of(args))
    print_report(report, args)
