"""`analyze_activations.py whiten fit`, `whiten apply` and `whiten check`."""

import argparse
from collections.abc import Iterator

from analysis.commands.functions import whiten_apply, whiten_check, whiten_fit
from analysis.commands.pass_flags import add_pass_flags, add_token_flags, options_of, print_report
from analysis.whitening.settings import BELOW_FLOOR, METHODS, SHRINKAGES
from core.base.command_line import not_negative, positive

_TOKENS = ("site", "drop", "tokenizer")


def add_whiten(commands: argparse._SubParsersAction) -> Iterator[argparse.ArgumentParser]:
    """The flags of the three commands."""
    whiten = commands.add_parser("whiten", help="fit, apply and check whitenings of one layer")
    steps = whiten.add_subparsers(dest="step", required=True)
    yield _add_fit(steps)
    yield _add_apply(steps)
    yield _add_check(steps)


def _add_fit(steps: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = steps.add_parser("fit", help="a whitening from the moments of one layer, as a safetensors file")
    _add_layer(parser)
    parser.add_argument("--method", choices=METHODS, default="zca", help="how it rotates (default zca)")
    parser.add_argument("--shrinkage", choices=SHRINKAGES, default="none", help="of the covariance (default none)")
    parser.add_argument("--components", type=positive(int), metavar="K", help="pca: keep so many, largest first")
    parser.add_argument(
        "--below", choices=BELOW_FLOOR, default="drop", help="directions without variance: out, or as if at the floor"
    )
    _add_stored_moments(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="such as w.safetensors; created once")
    add_pass_flags(parser, partials="DIR/analysis")
    parser.set_defaults(run=fit_command)
    return parser


def _add_apply(steps: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = steps.add_parser("apply", help="one layer, whitened, as chunks of padded samples with masks")
    _add_layer(parser)
    parser.add_argument("--whitening", required=True, metavar="FILE", help="what whiten fit wrote")
    parser.add_argument("--to", choices=("npz",), default="npz", help="the format of the chunks (default npz)")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="local or gs://; files are created once")
    parser.add_argument(
        "--chunk_samples", type=positive(int), default=1000, metavar="N", help="samples of a chunk (default 1000)"
    )
    parser.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="of the whitened values (default float16)"
    )
    add_pass_flags(parser, partials="OUTPUT/analysis")
    parser.set_defaults(run=apply_command)
    return parser


def _add_check(steps: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = steps.add_parser("check", help="max |WSW^T - I| of the whitened tokens; exit code 1 above the tolerance")
    _add_layer(parser)
    parser.add_argument("--whitening", required=True, metavar="FILE", help="what whiten fit wrote")
    parser.add_argument("--tolerance", type=not_negative(float), default=1e-5, metavar="E", help="(default 1e-5)")
    _add_stored_moments(parser)
    add_pass_flags(parser, partials="DIR/analysis")
    parser.set_defaults(run=check_command)
    return parser


def _add_layer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", help="the output folder, local or gs://, or one worker's folder in it")
    parser.add_argument("--layer", type=int, metavar="LAYER", help="may be left out where one is stored")
    parser.add_argument("--site", metavar="SITE", help="may be left out where one is stored")
    add_token_flags(parser)


def _add_stored_moments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stats", metavar="FILE", help="what stats or IncrementalWhitener.save wrote: used in place of the shards"
    )


def fit_command(args: argparse.Namespace) -> None:
    """Fits and stores a whitening."""
    names = (*_TOKENS, "method", "shrinkage", "components", "below", "stats", "output")
    options = {name: getattr(args, name) for name in names} | options_of(args)
    print_report(whiten_fit(args.dir, args.layer, **options), args)


def apply_command(args: argparse.Namespace) -> None:
    """Writes whitened chunks."""
    names = (*_TOKENS, "to", "chunk_samples", "dtype")
    options = {name: getattr(args, name) for name in names} | options_of(args)
    print_report(whiten_apply(args.dir, args.whitening, args.output, args.layer, **options), args)


def check_command(args: argparse.Namespace) -> int:
    """Prints the error; returns 0 when it is within the tolerance."""
    names = (*_TOKENS, "tolerance", "stats")
    options = {name: getattr(args, name) for name in names} | options_of(args)
    report = whiten_check(args.dir, args.whitening, args.layer, **options)
    print_report(report, args)
    return 0 if report.ok else 1
