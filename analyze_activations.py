"""Verifies, certifies, describes, whitens and exports committed shards; shows the status of a run. See README.md.

In Python: `verify(dir)`, `stats(dir)`, `whiten_fit(dir, layer)`, `whiten_apply(dir, whitening, output, layer)`,
`whiten_check(dir, whitening, layer)`, `export(dir, to, output=…)`, `import_activations(source, kind, output=…)`,
`mean(data, model_path, output)`, `mean_compare(folder)`, `mean_export(folder, to, output)`,
`certify(dir, model_path)`, `status(dir)`, `retry(dir, shards)`, `list_hooks(model_path)`.
"""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import logging

from analysis.commands.export_commands import add_export, export, import_activations
from analysis.commands.functions import stats, verify, whiten_apply, whiten_check, whiten_fit
from analysis.commands.pass_flags import print_report
from analysis.commands.stats_command import add_stats
from analysis.commands.verify_command import add_verify
from analysis.commands.whiten_commands import add_whiten
from analysis.mean_vectors.commands import mean, mean_compare, mean_export
from analysis.mean_vectors.parser import add_mean
from core.backends import BACKENDS, choose_backend
from core.base.arguments import path_text
from core.base.command_line import CommandParser, run_command
from core.base.dtypes import DTYPES

if TYPE_CHECKING:
    from analysis.certificate.fidelity import FidelityReport
    from analysis.fleet_status.report import FleetStatus
    from analysis.hook_table import HookTable

__all__ = [
    "certify",
    "export",
    "import_activations",
    "list_hooks",
    "mean",
    "mean_compare",
    "mean_export",
    "retry",
    "stats",
    "status",
    "verify",
    "whiten_apply",
    "whiten_check",
    "whiten_fit",
]


def build_parser() -> CommandParser:
    """The subcommands and their flags."""
    parser = CommandParser(description=__doc__)
    parser.set_defaults(verbose=False)
    commands = parser.add_subparsers(dest="command", required=True)
    on_shards = [add_verify(commands), add_stats(commands), *add_whiten(commands)]
    certificate = _add_certify(commands)
    hooks = _add_list_hooks(commands)
    fleet = _add_status(commands)
    retrying = commands.add_parser("retry", help="make workers retry dataset shards that were set aside for an error")
    retrying.add_argument("dir", help="the output folder, local or gs://")
    retrying.add_argument("shard", nargs="+", help="such as shard_007; status lists them")
    retrying.set_defaults(run=retry_command)
    for command in (*on_shards, certificate, hooks, fleet, retrying, *add_export(commands), *add_mean(commands)):
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        command.add_argument("--verbose", action="store_true", help="debug messages, and stack traces of errors")
    return parser


def certify(
    dir: str, model_path: str, *, revision: str | None = None, samples: int = 4, trust_remote_code: bool = False
) -> "FidelityReport":
    """Compares `samples` committed samples, evenly chosen, with transformers in float32; writes fidelity.json.

    Raises RunError without torch, UsageError or ModelError if the run and the model cannot be compared.
    """
    from analysis.certificate.certification import require_reference

    require_reference("certify: the reference")

    from analysis.certificate.certified_outputs import certify_output
    from torch_models.loading import ModelSource

    return certify_output(
        path_text(dir, "dir"), ModelSource(path_text(model_path, "model_path"), revision, trust_remote_code), samples
    )


def status(dir: str) -> "FleetStatus":
    """The status of a whole fleet: shards, owners, progress, throughput and time left."""
    from analysis.fleet_status import status as fleet

    return fleet.status(path_text(dir, "dir"))


def retry(dir: str, shards: str | Sequence[str]) -> dict[str, int]:
    """Makes workers retry dataset shards that were set aside; returns the number of deleted failures of each."""
    from analysis.fleet_status import status as fleet

    return fleet.retry(path_text(dir, "dir"), [shards] if isinstance(shards, str) else shards)


def list_hooks(
    model_path: str,
    *,
    revision: str | None = None,
    backend: str = "auto",
    trust_remote_code: bool = False,
    layers: Sequence[int] | None = None,
    max_seq_length: int | None = None,
    dtype: str = "float16",
) -> "HookTable":
    """The sites of a model that can be captured, with names and sizes; its weights are not read."""
    from analysis.hook_table import hook_table

    model_path = path_text(model_path, "model_path")
    found = choose_backend(backend, model_path, revision, trust_remote_code=trust_remote_code)
    shape = found.model_shape(model_path, revision)
    return hook_table(model_path, shape, layers=layers, dtype=dtype, max_seq_length=max_seq_length)


def _add_status(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    fleet = commands.add_parser("status", help="shards, owners, progress, throughput and time left of a whole fleet")
    fleet.add_argument("dir", help="the output folder, local or gs://")
    fleet.add_argument("--watch", action="store_true", help="repeat until nothing is left to do")
    fleet.add_argument("--interval", type=float, default=30.0, metavar="S", help="seconds between reports (default 30)")
    fleet.set_defaults(run=status_command)
    return fleet


def status_command(args: argparse.Namespace) -> None:
    """Prints the status of a fleet; with --json as one object each time."""
    from analysis.fleet_status.status import watch
    from core.base.errors import UsageError
    from core.run.config import MAX_WAIT_S

    if not 0 < args.interval <= MAX_WAIT_S:
        raise UsageError(f"--interval {args.interval}: must be above 0 and at most a year")
    for fleet in watch(args.dir, args.interval) if args.watch else [status(args.dir)]:
        for line in fleet.lines():
            logging.info("%s", line)
        if args.json:
            print(json.dumps(fleet.to_json()), flush=True)


def retry_command(args: argparse.Namespace) -> None:
    """Makes workers retry dataset shards that were set aside."""
    cleared = retry(args.dir, args.shard)
    for shard, failures in cleared.items():
        done = f"{failures} failures deleted: workers will claim it again" if failures else "it had no failures"
        logging.info("%s: %s", shard, done)
    if args.json:
        print(json.dumps(cleared))


def _add_certify(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    certificate = commands.add_parser(
        "certify", help="compare committed samples with transformers in float32; writes fidelity.json; needs torch"
    )
    certificate.add_argument("dir", help="the output folder, local or gs://, or one worker's folder in it")
    certificate.add_argument(
        "--model_path", required=True, help="the model of the run: HF folder, .gguf file or hub id"
    )
    certificate.add_argument("--revision", help="hub revision: a branch, tag or commit")
    certificate.add_argument("--samples", type=int, default=4, metavar="N", help="how many, evenly chosen (default 4)")
    certificate.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    certificate.set_defaults(run=certify_command)
    return certificate


def certify_command(args: argparse.Namespace) -> int:
    """Prints the certificate of a run; returns 0 when its activations are faithful to the model."""
    options = {"revision": args.revision, "samples": args.samples, "trust_remote_code": args.trust_remote_code}
    report = certify(args.dir, args.model_path, **options)
    print_report(report, args)
    return 0 if report.ok else 1


def _add_list_hooks(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    hooks = commands.add_parser("list-hooks", help="the sites of a model that can be captured, with names and sizes")
    hooks.add_argument("model", help="HF folder, .gguf file or hub id; its weights are not read")
    hooks.add_argument("--revision", help="hub revision: a branch, tag or commit")
    hooks.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="as of extract_activations.py (default auto)"
    )
    hooks.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    hooks.add_argument("--layers", type=int, nargs="+", metavar="LAYER", help="count only these blocks (default all)")
    hooks.add_argument("--max_seq_length", type=int, metavar="N", help="also the size of a sample of N tokens")
    hooks.add_argument("--dtype", choices=tuple(DTYPES), default="float16", help="stored dtype (default float16)")
    hooks.set_defaults(run=list_hooks_command)
    return hooks


def list_hooks_command(args: argparse.Namespace) -> None:
    """Prints the sites of a model on stdout, as a table or as one JSON object."""
    names = ("revision", "backend", "trust_remote_code", "layers", "max_seq_length", "dtype")
    table = list_hooks(args.model, **{name: getattr(args, name) for name in names})
    print(json.dumps(table.to_json()) if args.json else "\n".join(table.lines()))


def main() -> None:
    """The console command."""
    run_command(lambda args: args.run(args), build_parser)


if __name__ == "__main__":
    main()
