"""How every command starts and ends: absl's argparse bridge in, exit code and one-line error out."""

import argparse
import logging as standard_logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar
from urllib.parse import urlsplit

from absl import app, logging
from absl.flags import argparse_flags

from core.base.endpoints import is_loopback
from core.base.errors import ModelError, RunError, UsageError
from core.base.redaction import RedactingFormatter, printable, redact

_FORMAT = RedactingFormatter("%(asctime)s %(message)s", "%H:%M:%S")

Number = TypeVar("Number", int, float)


class CommandParser(argparse_flags.ArgumentParser):
    """Tells what is wrong with a command line in one line, as all other errors are told; so do its subcommands."""

    def error(self, message: str) -> NoReturn:
        """Exits."""
        self.exit(UsageError.exit_code, f"error: {printable(redact(message))} (--help lists the flags)\n")


def positive(kind: type[Number]) -> Callable[[str], Number]:
    """A type for argparse: finite numbers above 0."""
    return _number(kind, lambda number: number > 0, "above 0")


def not_negative(kind: type[Number]) -> Callable[[str], Number]:
    """A type for argparse: finite numbers from 0."""
    return _number(kind, lambda number: number >= 0, "0 or more")


def _number(kind: type[Number], holds: Callable[[Number], bool], rule: str) -> Callable[[str], Number]:
    noun = "a whole number" if kind is int else "a number"

    def convert(text: str) -> Number:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not math.isfinite(number) or not holds(number):
            raise argparse.ArgumentTypeError(f"{text}: expected {noun}, {rule}")
        return number

    return convert


def run_command(
    run: Callable[[argparse.Namespace], int | None],
    build_parser: Callable[[], argparse_flags.ArgumentParser],
) -> None:
    """Parses the command line, runs `run(args)` and exits with its code.

    `args` must carry `verbose`: errors are one line on stderr without it, and keep their stack trace with it.
    Exit codes: what `run` returns (None is 0), 2 for usage, 1 for every other failure, 130 after Ctrl-C.
    """

    def main(args: argparse.Namespace) -> int:
        _log_plainly(args.verbose)
        try:
            _refuse_clear_hub()
            return run(args) or 0
        except (RunError, ModelError) as error:
            return _report(error, args.verbose)
        except Exception as error:
            return _report(_as_run_error(error), args.verbose)
        except KeyboardInterrupt:
            print("interrupted: run the same command again to continue", file=sys.stderr)
            return 130

    def parse(argv: list[str]) -> argparse.Namespace:
        return build_parser().parse_args(argv[1:])

    app.run(main, flags_parser=parse)


def _refuse_clear_hub(environment: Mapping[str, str] = os.environ) -> None:
    """Raises UsageError when the hub, and the token for it, would be reached in the clear."""
    parts = urlsplit(environment.get("HF_ENDPOINT", ""))
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise UsageError(f"HF_ENDPOINT={environment['HF_ENDPOINT']}: http is for loopback only: use https")


def _log_plainly(verbose: bool) -> None:
    """Messages are for people: time and text, on stderr."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.DEBUG if verbose else logging.INFO)
    logging.get_absl_handler().setFormatter(_FORMAT)
    # JAX reports at INFO every accelerator that this machine does not have.
    standard_logging.getLogger("jax").setLevel(standard_logging.DEBUG if verbose else standard_logging.WARNING)


def log_to_file(path: str | None) -> None:
    """Writes what is logged to `path` as well; raises UsageError when it cannot be opened."""
    if path is None:
        return
    try:
        handler = standard_logging.FileHandler(path)
    except OSError as error:
        raise UsageError(f"--log_file {path}: {error.strerror}") from error
    handler.setFormatter(_FORMAT)
    logging.get_absl_logger().addHandler(handler)


def _as_run_error(error: Exception) -> RunError:
    """What nobody foresaw, in one line all the same; the trace is there for those who ask."""
    if isinstance(error, OSError) and error.strerror:
        return RunError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return RunError(f"{type(error).__name__}: {error} (an unexpected error: --verbose shows where)")


def _report(error: Exception, verbose: bool) -> int:
    """Prints the error that is being handled, with its stack trace for those who ask; returns the exit code."""
    if verbose:
        print(printable(redact(traceback.format_exc()), keep="\n\t"), file=sys.stderr)
    print(printable(redact("error: " + " ".join(str(error).split()))), file=sys.stderr)
    return error.exit_code if isinstance(error, RunError) else UsageError.exit_code
