"""Decides what to do about each TPU of a fleet: pure functions of what is wanted and what exists."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from core.base.errors import RunError, UsageError
from fleet.gcloud.accelerators import DEFAULT_TYPE, require_tpu_type, runtime_of
from fleet.gcloud.listing import WORKER_LABEL, Inventory, Kind, Resource
from fleet.gcloud.machines import Machine, Slot
from fleet.gcloud.naming import require_name, require_runtime


class Action(StrEnum):
    """What to do about one TPU."""

    CREATE = "create"
    RECREATE = "recreate"
    DELETE = "delete"
    WAIT = "wait"
    KEEP = "keep"
    LEAVE = "leave"  # the user has to decide
    CONFLICT = "conflict"  # the name is taken by something that is not ours


_IN_TRANSITION = (Action.WAIT, "in transition")
# https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.nodes#State
NODE_ACTIONS: Mapping[str, tuple[Action, str]] = {
    "READY": (Action.KEEP, "ready"),
    "PREEMPTED": (Action.RECREATE, "preempted; it cannot be started again"),
    "TERMINATED": (Action.RECREATE, "terminated; it cannot be started again"),
    "CREATING": _IN_TRANSITION,
    "RESTARTING": _IN_TRANSITION,
    "REIMAGING": _IN_TRANSITION,
    "REPAIRING": _IN_TRANSITION,
    "STARTING": _IN_TRANSITION,
    "STOPPING": _IN_TRANSITION,
    "DELETING": _IN_TRANSITION,
    "HIDING": _IN_TRANSITION,
    "UNHIDING": _IN_TRANSITION,
    "STATE_UNSPECIFIED": _IN_TRANSITION,
    "STOPPED": (Action.LEAVE, "stopped by someone: start or delete it"),
    "HIDDEN": (Action.LEAVE, "hidden: delete it to have it created again"),
    "UNKNOWN": (Action.LEAVE, "a repair failed: delete it to have it created again"),
}
_IN_THE_QUEUE = (Action.WAIT, "in the queue")
_LEAVING_THE_QUEUE = (Action.WAIT, "leaving the queue")
# https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources#State
# ACTIVE is missing: then the state of the node decides.
QUEUE_ACTIONS: Mapping[str, tuple[Action, str]] = {
    "FAILED": (Action.RECREATE, "refused by the queue"),
    "SUSPENDED": (Action.RECREATE, "suspended; the queue took its TPU back"),
    "CREATING": _IN_THE_QUEUE,
    "ACCEPTED": _IN_THE_QUEUE,
    "WAITING_FOR_RESOURCES": _IN_THE_QUEUE,
    "PROVISIONING": _IN_THE_QUEUE,
    "STATE_UNSPECIFIED": _IN_THE_QUEUE,
    "SUSPENDING": _LEAVING_THE_QUEUE,
    "DELETING": _LEAVING_THE_QUEUE,
}
ABSENT = "ABSENT"


@dataclass(frozen=True)
class Wishes:
    """The flags that describe machines; None where a flag was not given."""

    tpu_type: str | None = None
    runtime: str | None = None
    spot: bool | None = None
    queued: bool | None = None


@dataclass(frozen=True)
class Decision:
    """What to do about one slot, and why.

    `machine` is its configuration, present or future; None for a conflict, and when the flags leave it open.
    """

    slot: Slot
    action: Action
    state: str
    why: str
    machine: Machine | None
    delete: Kind | None = None


def wanted_slots(fleet: str, zones: Sequence[str], workers_per_zone: int, first_worker_id: int) -> tuple[Slot, ...]:
    """The TPUs <fleet>-<zone>-<i>; workers are numbered across the zones, in their order.

    Raises UsageError when a name is too long for a TPU.
    """
    pairs = [(zone, index) for zone in zones for index in range(workers_per_zone)]
    return tuple(
        Slot(require_name(f"{fleet}-{zone}-{index}"), zone, first_worker_id + number)
        for number, (zone, index) in enumerate(pairs)
    )


def existing_slots(fleet: str, found: Inventory) -> tuple[Slot, ...]:
    """The TPUs of the fleet that exist or are queued, by worker. Raises RunError for one without the worker label."""
    ours = {key: thing for key, thing in {**found.queue, **found.nodes}.items() if thing.fleet == fleet}
    slots = [Slot(require_name(name), zone, _worker_of(thing)) for (zone, name), thing in ours.items()]
    return tuple(sorted(slots, key=lambda slot: (slot.worker_id, slot.name)))


def _worker_of(thing: Resource) -> int:
    label = thing.labels.get(WORKER_LABEL, "")
    if not re.fullmatch(r"[0-9]{1,9}", label):
        raise RunError(f"{thing.name} in {thing.zone} has the label {WORKER_LABEL}={label!r}, which is no number")
    return int(label)


def decide(
    fleet: str,
    slots: Iterable[Slot],
    found: Inventory,
    wishes: Wishes,
    remembered: Mapping[str, Machine] = MappingProxyType({}),
) -> tuple[Decision, ...]:
    """A decision for each slot. `remembered` holds known configurations of absent TPUs, by name.

    Raises RunError when two TPUs would be the same worker.
    """
    machines = sorted({_machine_of(thing, found) for thing in found.nodes.values() if thing.fleet == fleet})
    decisions = tuple(_decide_one(fleet, slot, found, wishes, machines, remembered.get(slot.name)) for slot in slots)
    _require_distinct_workers(decisions)
    return decisions


def _decide_one(
    fleet: str, slot: Slot, found: Inventory, wishes: Wishes, machines: Sequence[Machine], before: Machine | None
) -> Decision:
    node = found.nodes.get((slot.zone, slot.name))
    queued = found.queue.get((slot.zone, slot.name))
    for thing in (node, queued):
        if thing is not None and thing.fleet != fleet:
            why = f"exists without the label of the fleet {fleet}: it is not touched"
            return Decision(slot, Action.CONFLICT, thing.state, why, None)
    thing = node or queued
    if thing is None:
        return Decision(slot, Action.CREATE, ABSENT, "absent", machine_for(wishes, before, machines))
    slot = Slot(slot.name, slot.zone, _worker_of(thing))
    action, state, why = required_action(node, queued)
    machine = _machine_of(thing, found)
    if action is Action.RECREATE:
        # Deleting the queued resource deletes its node; the node alone cannot be deleted.
        delete = Kind.NODE if queued is None else Kind.QUEUED
        return Decision(slot, action, state, why, machine_for(wishes, machine, machines), delete)
    if wishes.tpu_type not in (None, machine.tpu_type):
        why += f", but it is a {machine.tpu_type} and not a {wishes.tpu_type}"
    return Decision(slot, action, state, why, machine)


def required_action(node: Resource | None, queued: Resource | None) -> tuple[Action, str, str]:
    """Action, state and reason for a TPU of ours; `queued` is its queued resource if it has one.

    A state that this table does not know is left to a person.
    """
    if queued is not None and queued.state != "ACTIVE":
        action, why = QUEUE_ACTIONS.get(queued.state, (Action.LEAVE, "a state that this command does not know"))
        return action, queued.state, why
    if node is None:
        return (Action.WAIT, "ACTIVE", "its TPU is not listed yet") if queued else (Action.CREATE, ABSENT, "absent")
    action, why = NODE_ACTIONS.get(node.state, (Action.LEAVE, "a state that this command does not know"))
    return action, node.state, why


def require_machines(decisions: Iterable[Decision]) -> None:
    """Raises UsageError when the configuration of a new TPU is not clear."""
    for decision in decisions:
        if decision.action is Action.CREATE and decision.machine is None:
            raise UsageError(f"the fleet has several types: give the type of {decision.slot.name} with --tpu_type")


def machine_for(wishes: Wishes, before: Machine | None, others: Sequence[Machine]) -> Machine | None:
    """The configuration of a new TPU: from the flags, else its previous one, else that of the others, else the default.

    None when the others have several types and no flag selects one.
    """
    if before is None and wishes.tpu_type is None and len({machine.tpu_type for machine in others}) > 1:
        return None
    alike = [machine for machine in others if machine.tpu_type == wishes.tpu_type]
    like = before or next(iter([*alike, *others]), Machine(DEFAULT_TYPE, runtime_of(DEFAULT_TYPE), True, False))
    tpu_type = require_tpu_type(wishes.tpu_type or like.tpu_type)
    same = tpu_type == like.tpu_type
    return Machine(
        tpu_type=tpu_type,
        runtime=require_runtime(wishes.runtime or (same and like.runtime) or runtime_of(tpu_type)),
        spot=like.spot if wishes.spot is None else wishes.spot,
        queued=like.queued if wishes.queued is None else wishes.queued,
    )


def _machine_of(thing: Resource, found: Inventory) -> Machine:
    queued = (thing.zone, thing.name) in found.queue
    return Machine(thing.tpu_type, thing.runtime, thing.spot, queued)


def _require_distinct_workers(decisions: Iterable[Decision]) -> None:
    owners: dict[int, str] = {}
    for decision in decisions:
        slot = decision.slot
        if decision.action is Action.CONFLICT:
            continue
        if slot.worker_id in owners:
            raise RunError(
                f"{owners[slot.worker_id]} and {slot.name} would both be worker {slot.worker_id}: "
                "give all zones of the fleet in their order, or another --first_worker_id"
            )
        owners[slot.worker_id] = slot.name
