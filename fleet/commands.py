"""The subcommands: list first, decide, then change. They print their results and return exit codes."""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.base.errors import RunError, UsageError
from fleet.bundle import build_bundle
from fleet.decisions import Action, Decision, Wishes, decide, existing_slots, require_machines, wanted_slots
from fleet.gcloud.calls import Gcloud, Patience
from fleet.gcloud.listing import Inventory, Resource
from fleet.gcloud.machines import Machine, Slot
from fleet.gcloud.naming import require_name
from fleet.gcloud.parallel import each
from fleet.launching import ExtractionCommand, Launched, launch, require_flags
from fleet.reconciling import Outcome, delete, reconcile
from fleet.secrets import refuse_secrets
from fleet.watching import Round, dataset_finished, output_url, watch

ROOT = Path(__file__).parents[1]
_LOG = '"$HOME/activations/logs/extract.log"'


@dataclass(frozen=True)
class Context:
    """The flags, gcloud, and the TPUs that the flags select."""

    args: argparse.Namespace
    gcloud: Gcloud

    @property
    def fleet(self) -> str:
        """The fleet's name: its label, and the prefix of the names of its TPUs."""
        return str(self.args.fleet)

    @property
    def wishes(self) -> Wishes:
        """The flags that describe machines."""
        args = self.args
        return Wishes(args.tpu_type, args.runtime, args.spot, args.queued)

    def slots(self, found: Inventory) -> tuple[Slot, ...]:
        """The TPUs of --workers_per_zone, or without that flag those that exist."""
        if self.args.workers_per_zone is None:
            return existing_slots(self.fleet, found)
        return self.wanted()

    def wanted(self) -> tuple[Slot, ...]:
        """The TPUs of --workers_per_zone, from the flags alone."""
        args = self.args
        return wanted_slots(self.fleet, args.zones, args.workers_per_zone, args.first_worker_id)


def context_of(args: argparse.Namespace) -> Context:
    """gcloud with the settings of the flags. Raises UsageError if names would get too long, before any call."""
    patience = Patience(args.max_retries, args.retry_delay, args.gcloud_timeout)
    context = Context(args, Gcloud(args.project, patience, dry_run=args.dry_run))
    if getattr(args, "workers_per_zone", None) is not None:
        context.wanted()
    return context


def create_command(context: Context) -> int:
    """create and recreate-preempted: the same reconciliation with another default of --workers_per_zone."""
    if context.args.watch:
        return _watch(context, job=None)
    return _report(context, _reconciled(context, {}))


def _reconciled(context: Context, remembered: dict[str, Machine]) -> tuple[Outcome, ...]:
    """One reconciliation; uses and updates `remembered`."""
    found = context.gcloud.inventory(context.args.zones)
    decisions = decide(context.fleet, context.slots(found), found, context.wishes, remembered)
    require_machines(decisions)
    remembered.update({d.slot.name: d.machine for d in decisions if d.machine is not None})
    return reconcile(context.gcloud, context.fleet, decisions, context.args.service_account)


def status_command(context: Context) -> int:
    """status: the TPUs wanted, or without --workers_per_zone those that exist, and what create would do about them."""
    while True:
        found = context.gcloud.inventory(context.args.zones)
        decisions = decide(context.fleet, context.slots(found), found, Wishes())
        _print(context, [_status(decision) for decision in decisions])
        if not context.args.watch:
            return 0
        time.sleep(context.args.interval)


def _status(decision: Decision) -> dict[str, Any]:
    slot, machine = decision.slot, decision.machine
    return {
        "name": slot.name,
        "zone": slot.zone,
        "worker_id": slot.worker_id,
        "state": decision.state,
        "tpu_type": machine.tpu_type if machine else "",
        "spot": machine.spot if machine else "",
        "action": str(decision.action),
        "why": decision.why,
    }


def list_command(context: Context) -> int:
    """list: everything with the fleet's label, in all zones or those of --zones."""
    found = context.gcloud.inventory(context.args.zones or ("-",))
    things = [*found.nodes.values(), *found.queue.values()]
    ours = sorted((thing for thing in things if thing.fleet == context.fleet), key=lambda t: (t.zone, t.name, t.kind))
    fields = ("kind", "name", "zone", "state", "tpu_type", "runtime", "spot")
    _print(context, [{field: getattr(thing, field) for field in fields} for thing in ours])
    return 0


def delete_command(context: Context) -> int:
    """delete: the fleet's TPUs and queued resources, or with --workers_per_zone only that many in each zone."""
    return _report(context, _deleted(context))


def _deleted(context: Context) -> tuple[Outcome, ...]:
    found = context.gcloud.inventory(context.args.zones)
    return delete(context.gcloud, context.fleet, _to_delete(context.fleet, context.slots(found), found))


def _to_delete(fleet: str, slots: Sequence[Slot], found: Inventory) -> list[tuple[Slot, Resource]]:
    """What to delete for each slot: the queued resource, which takes its node with it, else the node."""
    pairs = []
    for slot in slots:
        key = (slot.zone, slot.name)
        things = [thing for thing in (found.queue.get(key), found.nodes.get(key)) if thing is not None]
        # Resources that are not ours come first: they are reported, and then neither is touched.
        things.sort(key=lambda thing: thing.fleet == fleet)
        pairs += [(slot, thing) for thing in things[:1]]
    return pairs


def launch_command(context: Context) -> int:
    """launch: starts the extraction on the TPUs that are ready; with --watch it also keeps them there."""
    args = context.args
    require_flags(args.command_flags)
    refuse_secrets([*args.command_flags, *(secret for _, secret in args.secret_env)])
    job = ExtractionCommand(tuple(args.command_flags), tuple(args.secret_env), build_bundle(ROOT))
    if args.watch:
        return _watch(context, job)
    found = context.gcloud.inventory(args.zones)
    decisions = decide(context.fleet, context.slots(found), found, context.wishes)
    launched = _launch_ready(context, job, decisions, again=True)
    missing = [decision for decision in decisions if decision.action is not Action.KEEP]
    for decision in missing:
        logging.warning("%s: not ready: %s (%s)", decision.slot.name, decision.state, decision.why)
    if not decisions:
        raise RunError(f"no TPU of the fleet {context.fleet} in {', '.join(args.zones)}: create them first")
    if args.json:
        _dump(context, [item.to_json() for item in launched] + [_status(decision) for decision in missing])
    return 0 if all(item.ok for item in launched) and not missing else 1


def _launch_ready(
    context: Context, job: ExtractionCommand, decisions: Sequence[Decision], *, again: bool
) -> tuple[Launched, ...]:
    ready = [decision for decision in decisions if decision.action is Action.KEEP]
    return launch(context.gcloud, job, ready, restart=context.args.restart, again=again)


def _watch(context: Context, job: ExtractionCommand | None) -> int:
    args = context.args
    if args.workers_per_zone is None:
        raise UsageError("--watch needs --workers_per_zone: it must know how many TPUs to recreate when some are gone")
    url = args.output or (output_url(args.command_flags) if job else None)
    remembered: dict[str, Machine] = {}

    def one_round() -> Round:
        outcomes = _reconciled(context, remembered)
        if job is None:
            return Round(outcomes, ())
        # TPUs created in this round are not in its listing; the next round finds them ready.
        return Round(outcomes, _launch_ready(context, job, [item.decision for item in outcomes], again=False))

    def finished(last: Round) -> bool | None:
        return None if url is None else dataset_finished(url, ROOT, last.has_ended)

    if args.dry_run:
        one_round()  # a second round would give the same result
        return 0
    verdict = watch(one_round, finished, lambda: time.sleep(args.interval))
    logging.info(verdict.message)
    tpus = [outcome.to_json() for outcome in verdict.last.outcomes]
    tpus += [launched.to_json() for launched in verdict.last.launched]
    ok = verdict.ok
    if ok and args.delete_when_finished:
        deleted = _deleted(context)
        tpus += [item.to_json() for item in deleted]
        ok = all(item.ok for item in deleted)
    if args.json:
        _dump(context, tpus)
    return 0 if ok else 1


def ssh_command(context: Context) -> int:
    """ssh: a shell on a host of a TPU of the fleet, or a command on one or all of its hosts."""
    slot = _slot_named(context, context.args.name)
    words = context.args.command_flags
    script = None if not words else " ".join(words)
    return context.gcloud.attached(context.gcloud.ssh_command(slot, script, context.args.worker))


def _slot_named(context: Context, name: str) -> Slot:
    found = context.gcloud.inventory(context.args.zones or ("-",))
    slots = [slot for slot in existing_slots(context.fleet, found) if slot.name == require_name(name)]
    if len(slots) != 1:
        raise RunError(f"{name}: no TPU of the fleet {context.fleet} has this name; manage_tpus.sh list shows them")
    return slots[0]


def logs_command(context: Context) -> int:
    """logs: the last lines of every host's log, and with --follow new ones."""
    args, gcloud = context.args, context.gcloud
    found = gcloud.inventory(args.zones)
    ready = [d.slot for d in decide(context.fleet, context.slots(found), found, Wishes()) if d.action is Action.KEEP]
    if not ready:
        raise RunError(f"no TPU of the fleet {context.fleet} in {', '.join(args.zones)} is ready")
    follow = "-F" if args.follow else ""

    def show(slot: Slot) -> int:
        script = f'tail -n {args.lines} {follow} {_LOG} | sed -u "s/^/{slot.name} $(hostname): /"'
        return gcloud.attached(gcloud.ssh_command(slot, script, "all"))

    return max(each(ready, show, on_interrupt=gcloud.stop)) and 1


def _report(context: Context, outcomes: Sequence[Outcome]) -> int:
    if context.args.json:
        _dump(context, [outcome.to_json() for outcome in outcomes])
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def _dump(context: Context, tpus: Sequence[dict[str, Any]]) -> None:
    args = context.args
    print(
        json.dumps({"fleet": context.fleet, "command": args.command, "dry_run": args.dry_run, "tpus": tpus}), flush=True
    )


def _print(context: Context, rows: Sequence[dict[str, Any]]) -> None:
    """Prints a table, or with --json one object."""
    if context.args.json:
        _dump(context, rows)
        return
    if not rows:
        print(f"nothing of the fleet {context.fleet} here", flush=True)
        return
    table = [[name.upper() for name in rows[0]], *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)
