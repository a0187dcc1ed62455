"""Works on committed shards, and tells how far a run is and what can be captured. See README.md."""

import argparse
import json

from absl import logging

from core.base.command_line import CommandParser, run_command
from core.base.dtypes import DTYPES
from core.step.backends import BACKENDS, choose_backend


def build_parser() -> CommandParser:
    """One subcommand for each job on shards."""
    parser = CommandParser(description=__doc__)
    parser.set_defaults(verbose=False)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("verify", help="check every committed shard; exit code 0 when all is well, else 1")
    check.add_argument("dir", help="the output folder, local or gs://, or one worker's folder in it")
    check.add_argument("--allow_unfinished", action="store_true", help="a run that is not at its end yet is no problem")
    check.set_defaults(run=verify_command)
    certificate = _add_certify(commands)
    hooks = _add_list_hooks(commands)
    fleet = _add_status(commands)
    again = commands.add_parser("retry", help="let workers try shards again that were set aside for an error")
    again.add_argument("dir", help="the output folder, local or gs://")
    again.add_argument("shard", nargs="+", help="such as shard_007; status names them")
    again.set_defaults(run=retry_command)
    for command in (check, certificate, hooks, fleet, again):
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        command.add_argument("--verbose", action="store_true", help="debug messages, and stack traces of errors")
    return parser


def _add_status(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    fleet = commands.add_parser("status", help="shards, owners, progress, throughput and time left of a whole fleet")
    fleet.add_argument("dir", help="the output folder, local or gs://")
    fleet.add_argument("--watch", action="store_true", help="again and again, until nothing is left to do")
    fleet.add_argument("--interval", type=float, default=30.0, metavar="S", help="between two looks (default 30)")
    fleet.set_defaults(run=status_command)
    return fleet


def status_command(args: argparse.Namespace) -> None:
    """Prints how far a fleet is; with --json one object for each look."""
    from analysis.fleet_status.status import status, watch
    from core.base.errors import UsageError
    from core.run.config import LONGEST_WAIT_S

    if not 0 < args.interval <= LONGEST_WAIT_S:
        raise UsageError(f"--interval {args.interval}: must be above 0 and at most a year")
    for fleet in watch(args.dir, args.interval) if args.watch else [status(args.dir)]:
        for line in fleet.lines():
            logging.info("%s", line)
        if args.json:
            print(json.dumps(fleet.to_json()), flush=True)


def retry_command(args: argparse.Namespace) -> None:
    """Has shards tried again that were set aside."""
    from analysis.fleet_status.status import retry

    cleared = retry(args.dir, args.shard)
    for shard, failures in cleared.items():
        done = f"{failures} failures forgotten: workers claim it again" if failures else "no failures to forget"
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
    certificate.add_argument("--trust_remote_code", action="store_true", help="run the code that the model brings")
    certificate.set_defaults(run=certify_command)
    return certificate


def certify_command(args: argparse.Namespace) -> int:
    """Prints the certificate of a run; returns 0 when its activations are those of the model."""
    from analysis.certificate.certification import require_reference

    require_reference("certify: the reference")

    from analysis.certificate.certified_outputs import certify_output
    from torch_models.loading import ModelSource

    source = ModelSource(args.model_path, args.revision, args.trust_remote_code)
    report = certify_output(args.dir, source, args.samples)
    for line in report.lines():
        logging.info("%s", line)
    if args.json:
        print(json.dumps(report.to_json()))
    return 0 if report.ok else 1


def _add_list_hooks(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    hooks = commands.add_parser("list-hooks", help="what can be captured of a model, under which names, at what size")
    hooks.add_argument("model", help="HF folder, .gguf file or hub id; its weights are not read")
    hooks.add_argument("--revision", help="hub revision: a branch, tag or commit")
    hooks.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="as of extract_activations.py (default auto)"
    )
    hooks.add_argument("--trust_remote_code", action="store_true", help="run the code that the model brings")
    hooks.add_argument("--layers", type=int, nargs="+", metavar="LAYER", help="count these blocks alone (default all)")
    hooks.add_argument("--max_seq_length", type=int, metavar="N", help="also the size of a sample of N tokens")
    hooks.add_argument("--dtype", choices=tuple(DTYPES), default="float16", help="stored dtype (default float16)")
    hooks.set_defaults(run=list_hooks_command)
    return hooks


def list_hooks_command(args: argparse.Namespace) -> None:
    """Prints the sites of a model on stdout, as a table or as one JSON object."""
    from analysis.hook_table import hook_table

    backend = choose_backend(args.backend, args.model, args.revision, trust_remote_code=args.trust_remote_code)
    model = backend.model_shape(args.model, args.revision)
    table = hook_table(args.model, model, layers=args.layers, dtype=args.dtype, max_seq_length=args.max_seq_length)
    print(json.dumps(table.to_json()) if args.json else "\n".join(table.lines()))


def verify_command(args: argparse.Namespace) -> int:
    """Prints what is wrong with the shards of a run; returns 0 when nothing is."""
    from analysis.verification.verify import verify

    report = verify(args.dir, allow_unfinished=args.allow_unfinished)
    for line in report.lines():
        logging.info("%s", line)
    if args.json:
        print(json.dumps(report.to_json()))
    return 0 if report.ok else 1


def main() -> None:
    """The console script."""
    run_command(lambda args: args.run(args), build_parser)


if __name__ == "__main__":
    main()
