"""The command line of scripts/manage_tpus.sh. Every value that is passed to gcloud is checked here, before any call."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from core.base.errors import RunError, UsageError
from core.base.redaction import RedactingFormatter, printable, redact
from fleet import commands
from fleet.gcloud import naming
from fleet.gcloud.accelerators import require_tpu_type

_MOST_WORKERS = 512


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, with secrets redacted."""

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"error: {printable(redact(message))} (--help lists the flags)\n")


def build_parser() -> argparse.ArgumentParser:
    """The subcommands and their flags."""
    parser = _Parser(prog="manage_tpus.sh", description="Fleets of TPU VMs: docs/tpu_fleets.md.")
    add = parser.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser
    flags: dict[str, Any] = {"allow_abbrev": False}
    create = add("create", help="create what is missing, recreate what was preempted", **flags)
    recreate = add("recreate-preempted", help="the same, by default only for the TPUs that exist", **flags)
    start = add("launch", help="start the extraction on ready TPUs: launch FLAGS -- EXTRACTION FLAGS", **flags)
    status = add("status", help="show what exists, and what create would do about it", **flags)
    delete = add("delete", help="delete the fleet's TPUs and queued resources", **flags)
    logs = add("logs", help="show the extraction's logs", **flags)
    show = add("list", help="list everything with the fleet's label, in all zones by default", **flags)
    ssh = add("ssh", help="open a shell or run a command: ssh NAME [-- COMMAND]", **flags)
    for command, run in (
        *((create, commands.create_command), (recreate, commands.create_command), (start, commands.launch_command)),
        *((status, commands.status_command), (delete, commands.delete_command), (logs, commands.logs_command)),
        *((show, commands.list_command), (ssh, commands.ssh_command)),
    ):
        _add_common_flags(command, zones_needed=command not in (show, ssh))
        command.set_defaults(run=run, command_flags=(), watch=False)
    for command in (create, recreate, start, status, delete, logs):
        _add_number_flags(command, default=1 if command is create else None)
    for command in (create, recreate, start):
        _add_machine_flags(command)
    for command in (recreate, start, status):
        _add_watch_flags(command)
    for command in (recreate, start):
        _add_finish_flags(command)
    _add_launch_flags(start)
    logs.add_argument("--follow", action="store_true", help="keep printing new lines")
    logs.add_argument("--lines", type=_count("--lines", 0, 10**6), default=20, help="lines per host (default 20)")
    ssh.add_argument("name", type=_checked(naming.require_name), help="name of the TPU, as list prints it")
    ssh.add_argument(
        "--worker", type=_checked(naming.require_hosts), default="0", help="number of a host, or all (default 0)"
    )
    return parser


def _checked(check: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type for argparse that keeps the message of a UsageError; argparse hides that of a ValueError."""

    def convert(text: str) -> Any:
        try:
            return check(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def _count(flag: str, least: int, most: int) -> Callable[[str], Any]:
    return _checked(lambda text: naming.require_count(text, flag, least, most))


def _seconds(flag: str, most: float) -> Callable[[str], Any]:
    return _checked(lambda text: naming.require_seconds(text, flag, most))


def _add_common_flags(command: argparse.ArgumentParser, *, zones_needed: bool) -> None:
    add = command.add_argument
    add(
        "--zones",
        type=_checked(naming.require_zones),
        required=zones_needed,
        help="such as us-central1-a,us-central1-b",
    )
    add(
        "--fleet",
        type=_checked(naming.require_name),
        default="activations",
        help="name of the fleet: its label, and the prefix of TPU names (default activations)",
    )
    add("--project", type=_checked(naming.require_project), help="project id (default: gcloud's)")
    add("--max_retries", type=_count("--max_retries", 0, 100), default=3, help="retries of a gcloud call (default 3)")
    add(
        "--retry_delay",
        type=_seconds("--retry_delay", 3600),
        default=10.0,
        help="seconds before the first retry (default 10)",
    )
    add(
        "--gcloud_timeout",
        type=_seconds("--gcloud_timeout", 86400),
        default=1800.0,
        help="seconds that a gcloud call may take (default 1800)",
    )
    add("--dry-run", "--dry_run", action="store_true", help="print the calls that would change something")
    add("--json", action="store_true", help="print one JSON object on stdout")
    add("--verbose", action="store_true", help="stack traces of errors")


def _add_number_flags(command: argparse.ArgumentParser, default: int | None) -> None:
    add = command.add_argument
    help_text = "TPUs in each zone (default 1)" if default else "TPUs in each zone (default: those that exist)"
    add("--workers_per_zone", type=_count("--workers_per_zone", 1, _MOST_WORKERS), default=default, help=help_text)
    add(
        "--first_worker_id",
        type=_count("--first_worker_id", 0, 10**6),
        default=0,
        help="number of the first worker in the first zone (default 0)",
    )


def _add_machine_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--tpu_type", type=_checked(require_tpu_type), help="TPU type (default: that of the fleet, else v5litepod-8)")
    add(
        "--runtime",
        type=_checked(naming.require_runtime),
        help="runtime version (default: the one for JAX on the type)",
    )
    add("--spot", action="store_true", default=None, help="preemptible (default, unless the fleet is on demand)")
    add("--on-demand", "--on_demand", dest="spot", action="store_false", help="not preemptible")
    add(
        "--queued",
        action="store_true",
        default=None,
        help="request TPUs through queued resources and wait in the queue",
    )
    add(
        "--service_account",
        type=_checked(naming.require_service_account),
        help="account that the VMs run as (default: Compute Engine's)",
    )


def _add_watch_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--watch", action="store_true", help="repeat until the dataset is finished (status: until interrupted)")
    add("--interval", type=_seconds("--interval", 86400), default=120.0, help="seconds between rounds (default 120)")


def _add_finish_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    url = _checked(naming.require_bucket_url)
    add("--output", type=url, help="gs:// URL of the activations (default: from the extraction flags)")
    add("--delete_when_finished", action="store_true", help="with --watch: delete the fleet at the end")


def _add_launch_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--restart", action="store_true", help="end another job that runs there first")
    secret = "VARIABLE=NAME: fill an environment variable from Secret Manager"
    add("--secret_env", type=_checked(naming.require_secret), action="append", default=[], help=secret)


def main(argv: Sequence[str]) -> int:
    """Runs a subcommand. Exit codes: 0 all as wanted or in transition, 1 not all, 2 usage, 130 Ctrl-C."""
    messages = logging.StreamHandler(sys.stderr)
    messages.setFormatter(RedactingFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[messages])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    own, separator, rest = _split(argv)
    args = build_parser().parse_args(own)
    if separator and args.command not in ("launch", "ssh"):
        print(f"error: {args.command} takes nothing after --", file=sys.stderr)
        return 2
    args.command_flags = rest
    try:
        return int(args.run(commands.context_of(args)))
    except RunError as error:
        if args.verbose:
            raise
        print(printable(redact("error: " + " ".join(str(error).split()))), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _split(argv: Sequence[str]) -> tuple[list[str], bool, tuple[str, ...]]:
    """The flags before the first --, whether there is one, and what follows it."""
    words = list(argv)
    if "--" not in words:
        return words, False, ()
    at = words.index("--")
    return words[:at], True, tuple(words[at + 1 :])
