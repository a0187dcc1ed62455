"""How every command starts and ends: absl's argparse bridge in, exit code and one-line error out."""

import argparse
import logging as standard_logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from absl import app, logging
from absl.flags import argparse_flags

from core.base.endpoints import is_loopback
from core.base.errors import ModelError, RunError, UsageError
from core.base.redaction import RedactingFormatter, printable, redact

_FORMAT = RedactingFormatter("%(asctime)s %(message)s", "%H:%M:%S")

Number = TypeVar("Number", int, float)


class CommandParser(argparse_flags.ArgumentParser):
    """Reports usage errors in one line, like all other errors; its subcommands do, too.

    Attributes:
      longer_commands: parsers of the commands that begin with the words of this one, by their next word.
    """

    longer_commands: Mapping[str, "CommandParser"] = {}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, or as a longer command does that the first argument names."""
        longer = self.longer_commands.get(args[0]) if args else None
        if longer is not None:
            return longer.parse_known_args(args[1:], namespace)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Prints the error and exits."""
        self.exit(UsageError.exit_code, f"error: {printable(redact(message))} (--help lists the flags)\n")


def positive(kind: type[Number]) -> Callable[[str], Number]:
    """An argparse type: finite numbers above 0."""
    return _number_type(kind, lambda value: value > 0, "above 0")


def not_negative(kind: type[Number]) -> Callable[[str], Number]:
    """An argparse type: finite numbers of at least 0."""
    return _number_type(kind, lambda value: value >= 0, "0 or more")


def _number_type(kind: type[Number], is_valid: Callable[[Number], bool], rule: str) -> Callable[[str], Number]:
    noun = "a whole number" if kind is int else "a number"

    def convert(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text}: expected {noun}, {rule}")
        return value

    return convert


def run_command(
    run: Callable[[argparse.Namespace], int | None],
    build_parser: Callable[[], argparse_flags.ArgumentParser],
) -> None:
    """Parses the command line, runs `run(args)` and exits with its code.

    `args` must have `verbose`: without it errors are one line on stderr, with it they keep their stack trace.
    Exit codes: the result of `run` (None is 0), 2 for usage, 1 for every other failure, 130 after Ctrl-C.
    """

    def main(args: argparse.Namespace) -> int:
        configure_logging(verbose=args.verbose)
        try:
            _refuse_plaintext_hub()
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


def _refuse_plaintext_hub(environment: Mapping[str, str] = os.environ) -> None:
    """Raises UsageError when requests to the hub, with the token in them, would go unencrypted."""
    parts = urlsplit(environment.get("HF_ENDPOINT", ""))
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise UsageError(f"HF_ENDPOINT={environment['HF_ENDPOINT']}: http is for loopback only: use https")


def configure_logging(*, verbose: bool = False) -> None:
    """Sends log messages to stderr, as time and text."""
    logging.use_absl_handler()
    # A notebook has no flags of absl to parse: absl's warning about that would be its first line.
    logging._warn_preinit_stderr = False  # type: ignore[attr-defined]
    logging.set_verbosity(logging.DEBUG if verbose else logging.INFO)
    logging.get_absl_handler().setFormatter(_FORMAT)
    # At INFO, JAX logs every accelerator that this machine does not have.
    standard_logging.getLogger("jax").setLevel(standard_logging.DEBUG if verbose else standard_logging.WARNING)


def log_to_file(path: str | None) -> None:
    """Also writes the log to `path`; raises UsageError when it cannot be opened."""
    if path is None:
        return
    try:
        handler = standard_logging.FileHandler(path)
    except OSError as error:
        raise UsageError(f"--log_file {path}: {error.strerror}") from error
    handler.setFormatter(_FORMAT)
    logging.get_absl_logger().addHandler(handler)


def _as_run_error(error: Exception) -> RunError:
    """An unexpected error as a one-line RunError; --verbose prints the stack trace."""
    if isinstance(error, OSError) and error.strerror:
        return RunError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return RunError(f"{type(error).__name__}: {error} (an unexpected error: --verbose shows where)")


def _report(error: Exception, verbose: bool) -> int:
    """Prints the error that is being handled, with its stack trace if `verbose`; returns the exit code."""
    if verbose:
        print(printable(redact(traceback.format_exc()), allowed="\n\t"), file=sys.stderr)
    print(printable(redact("error: " + " ".join(str(error).split()))), file=sys.stderr)
    return error.exit_code if isinstance(error, RunError) else UsageError.exit_code
