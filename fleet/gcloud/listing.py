"""Parses and checks what gcloud lists.

Two resources share a name: the node (the TPU itself) and, if it was requested with --queued, the queued resource that
holds its place in the queue. A listing that cannot be parsed completely is an error, because an overlooked TPU would be
taken for absent.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from core.base.errors import RunError

FLEET_LABEL = "activations-fleet"
WORKER_LABEL = "activations-worker"


class Kind(StrEnum):
    """The collection of the TPU API that a resource is in."""

    NODE = "nodes"
    QUEUED = "queuedResources"


@dataclass(frozen=True)
class Resource:
    """A TPU VM, or a place in the queue with the type, runtime and labels of the one node it asks for."""

    kind: Kind
    name: str
    zone: str
    state: str
    labels: Mapping[str, str]
    tpu_type: str
    runtime: str
    spot: bool

    @property
    def fleet(self) -> str | None:
        """The fleet it belongs to; None when it is not ours."""
        return self.labels.get(FLEET_LABEL)


@dataclass(frozen=True)
class Inventory:
    """All nodes and queued resources of the zones, by zone and name."""

    nodes: Mapping[tuple[str, str], Resource]
    queue: Mapping[tuple[str, str], Resource]


def inventory(resources: Iterable[Resource]) -> Inventory:
    """The resources by kind, zone and name. Raises RunError when one is listed twice."""
    found: dict[Kind, dict[tuple[str, str], Resource]] = {kind: {} for kind in Kind}
    for resource in resources:
        key = (resource.zone, resource.name)
        if key in found[resource.kind]:
            raise RunError(f"gcloud lists {resource.name} in {resource.zone} twice; nothing was changed")
        found[resource.kind][key] = resource
    return Inventory(found[Kind.NODE], found[Kind.QUEUED])


def parse_list(text: str, kind: Kind, zone: str) -> tuple[Resource, ...]:
    """The resources in the JSON of a `list`, which must be in `zone` (`-`: anywhere).

    Raises RunError when any part of the text differs from the TPU API v2.
    """
    records = _json(text, f"the {kind} of {zone}")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise RunError(f"gcloud's answer about the {kind} of {zone} is not a list of JSON objects; nothing was changed")
    return tuple(_parse_resource(record, kind, zone) for record in records)


def parse_description(text: str, kind: Kind, zone: str) -> Resource:
    """The resource in the JSON of a `describe`; raises as `parse_list` does."""
    record = _json(text, f"one of the {kind} of {zone}")
    if not isinstance(record, dict):
        raise RunError(f"gcloud's answer about one of the {kind} of {zone} is not a JSON object; nothing was changed")
    return _parse_resource(record, kind, zone)


def _parse_resource(record: Mapping[str, Any], kind: Kind, zone: str) -> Resource:
    found_zone, name = _place(record, kind, zone)
    node, state, spot = _parts_of_queued(record, name) if kind is Kind.QUEUED else _parts_of_node(record, name)
    return Resource(
        kind=kind,
        name=name,
        zone=found_zone,
        state=state or "STATE_UNSPECIFIED",
        labels=_labels(node, name),
        tpu_type=_text(node, "acceleratorType", name).rpartition("/")[2],
        runtime=_text(node, "runtimeVersion", name),
        spot=spot,
    )


def _parts_of_node(record: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], str, bool]:
    scheduling = _mapping(record, "schedulingConfig", name)
    spot = scheduling.get("spot") is True or scheduling.get("preemptible") is True
    return record, _text(record, "state", name), spot


def _parts_of_queued(record: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], str, bool]:
    specs = _mapping(record, "tpu", name).get("nodeSpec", [])
    if not isinstance(specs, list) or not all(isinstance(spec, dict) for spec in specs):
        raise _malformed(name, "tpu.nodeSpec")
    # Ours request one node each. Others are given no labels, so they are never taken for ours.
    node = _mapping(specs[0], "node", name) if len(specs) == 1 else {}
    return node, _text(_mapping(record, "state", name), "state", name), "spot" in record


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"gcloud's answer about {what} is not JSON ({error}); nothing was changed") from error


def _place(record: Mapping[str, Any], kind: Kind, zone: str) -> tuple[str, str]:
    """Zone and name out of projects/P/locations/ZONE/<kind>/NAME."""
    path = record.get("name")
    parts = path.split("/") if isinstance(path, str) else []
    if len(parts) != 6 or parts[0::2] != ["projects", "locations", kind] or not all(parts):
        raise RunError(f"gcloud lists something named {path!r} among the {kind}; nothing was changed")
    if zone not in ("-", parts[3]):
        raise RunError(f"gcloud lists {path} when asked for {zone}; nothing was changed")
    return parts[3], parts[5]


def _malformed(name: str, field: str) -> RunError:
    return RunError(f"gcloud's answer about {name} has an unexpected {field}; nothing was changed")


def _text(record: Mapping[str, Any], field: str, name: str) -> str:
    value = record.get(field, "")
    if not isinstance(value, str):
        raise _malformed(name, field)
    return value


def _mapping(record: Mapping[str, Any], field: str, name: str) -> Mapping[str, Any]:
    value = record.get(field, {})
    if not isinstance(value, dict):
        raise _malformed(name, field)
    return value


def _labels(record: Mapping[str, Any], name: str) -> Mapping[str, str]:
    labels = _mapping(record, "labels", name)
    if not all(isinstance(value, str) for value in labels.values()):
        raise _malformed(name, "labels")
    return labels
