"""Carries out decisions, each TPU independently of the others."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from core.base.errors import RunError
from fleet.decisions import ABSENT, Action, Decision, required_action
from fleet.gcloud.calls import Failure, Gcloud, GcloudError
from fleet.gcloud.listing import Kind, Resource
from fleet.gcloud.machines import Slot
from fleet.gcloud.parallel import each


class Result(StrEnum):
    """The result for one TPU."""

    READY = "ready"
    WAITING = "waiting"
    CREATED = "created"
    QUEUED = "queued"
    RECREATED = "recreated"
    DELETED = "deleted"
    CHANGED_MEANWHILE = "changed meanwhile"
    LEFT = "left alone"
    CONFLICT = "conflict"
    NO_CAPACITY = "no capacity"
    FAILED = "failed"
    DRY_RUN = "dry run"


_BAD = {Result.LEFT, Result.CONFLICT, Result.NO_CAPACITY, Result.FAILED}
_NOTHING_TO_DO = {
    Action.KEEP: Result.READY,
    Action.WAIT: Result.WAITING,
    Action.LEAVE: Result.LEFT,
    Action.CONFLICT: Result.CONFLICT,
}


@dataclass(frozen=True)
class Outcome:
    """A decision and its result."""

    decision: Decision
    result: Result
    message: str

    @property
    def ok(self) -> bool:
        """Whether the TPU is as wanted, or will be without the user doing anything."""
        return self.result not in _BAD

    def line(self) -> str:
        """The outcome as a log line."""
        slot = self.decision.slot
        machine = f", {self.decision.machine.label}" if self.decision.machine else ""
        return f"{slot.name} (worker {slot.worker_id}{machine}): {self.result}: {self.message}"

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain values."""
        machine = self.decision.machine
        return {
            "name": self.decision.slot.name,
            "zone": self.decision.slot.zone,
            "worker_id": self.decision.slot.worker_id,
            "state": self.decision.state,
            "action": str(self.decision.action),
            "result": str(self.result),
            "message": self.message,
            "tpu_type": machine.tpu_type if machine else None,
            "runtime": machine.runtime if machine else None,
            "spot": machine.spot if machine else None,
            "queued": machine.queued if machine else None,
        }


def reconcile(
    gcloud: Gcloud, fleet: str, decisions: Sequence[Decision], service_account: str | None = None
) -> tuple[Outcome, ...]:
    """Creates and recreates as the decisions say; the failure of one TPU, or of its zone, does not stop the others."""

    def one(decision: Decision) -> Outcome:
        try:
            outcome = _apply(gcloud, fleet, decision, service_account)
        except GcloudError as error:
            result = Result.NO_CAPACITY if error.failure is Failure.CAPACITY else Result.FAILED
            outcome = Outcome(decision, result, str(error))
        except RunError as error:
            outcome = Outcome(decision, Result.FAILED, str(error))
        logging.info(outcome.line())
        return outcome

    return tuple(each(decisions, one, on_interrupt=gcloud.stop))


def _apply(gcloud: Gcloud, fleet: str, decision: Decision, service_account: str | None) -> Outcome:
    slot, action, machine = decision.slot, decision.action, decision.machine
    if action in _NOTHING_TO_DO:
        return Outcome(decision, _NOTHING_TO_DO[action], decision.why)
    assert machine is not None, "a TPU to create has a machine"
    if decision.delete is not None:
        changed = _delete_checked(gcloud, fleet, decision, decision.delete)
        if changed is not None:
            return changed
    logging.info("%s: creating %s; it was %s", slot.name, machine.label, decision.why)
    try:
        gcloud.create(fleet, slot, machine, service_account)
    except GcloudError as error:
        # Another run was faster, or the answer to our own request was lost: the label decides.
        if error.failure is not Failure.EXISTS:
            raise
        found = gcloud.describe(Kind.QUEUED if machine.queued else Kind.NODE, slot)
        if found is None or found.fleet != fleet:
            return _conflict(decision, fleet)
    if gcloud.dry_run:
        return Outcome(decision, Result.DRY_RUN, f"{action}: {decision.why}")
    if machine.queued:
        return Outcome(decision, Result.QUEUED, f"in the queue; it was {decision.why}")
    return Outcome(decision, Result.RECREATED if decision.delete else Result.CREATED, f"it was {decision.why}")


def _delete_checked(gcloud: Gcloud, fleet: str, decision: Decision, kind: Kind) -> Outcome | None:
    """Deletes a TPU if that is still right: the listing may be minutes old, and another run may have changed it."""
    node = gcloud.describe(Kind.NODE, decision.slot)
    queued = gcloud.describe(Kind.QUEUED, decision.slot) if kind is Kind.QUEUED else None
    if any(thing is not None and thing.fleet != fleet for thing in (node, queued)):
        return _conflict(decision, fleet)
    action, state, _ = required_action(node, queued)
    if action is Action.RECREATE:
        logging.info("%s: deleting it: %s", decision.slot.name, state)
        gcloud.delete(kind, decision.slot)
    elif action is not Action.CREATE:
        return Outcome(replace(decision, state=state), Result.CHANGED_MEANWHILE, f"now {state}: not touched")
    return None


def delete(gcloud: Gcloud, fleet: str, things: Sequence[tuple[Slot, Resource]]) -> tuple[Outcome, ...]:
    """Deletes each resource after checking its label again."""

    def one(pair: tuple[Slot, Resource]) -> Outcome:
        slot, thing = pair
        decision = Decision(slot, Action.DELETE, thing.state, "to be deleted", None, thing.kind)
        try:
            outcome = _delete_one(gcloud, fleet, decision, thing)
        except RunError as error:
            outcome = Outcome(decision, Result.FAILED, str(error))
        logging.info(outcome.line())
        return outcome

    return tuple(each(things, one, on_interrupt=gcloud.stop))


def _delete_one(gcloud: Gcloud, fleet: str, decision: Decision, thing: Resource) -> Outcome:
    if thing.fleet != fleet:
        return _conflict(decision, fleet)
    found = gcloud.describe(thing.kind, decision.slot)
    if found is None:
        return Outcome(replace(decision, state=ABSENT), Result.DELETED, "gone already")
    if found.fleet != fleet:
        return _conflict(decision, fleet)
    if found.state == "DELETING":
        return Outcome(decision, Result.WAITING, "is being deleted")
    gcloud.delete(thing.kind, decision.slot)
    return Outcome(decision, Result.DRY_RUN if gcloud.dry_run else Result.DELETED, f"it was {thing.state}")


def _conflict(decision: Decision, fleet: str) -> Outcome:
    return Outcome(decision, Result.CONFLICT, f"exists without the label of the fleet {fleet}: it is not touched")
