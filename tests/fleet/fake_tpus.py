"""A TPU service in one JSON file: what the stub of gcloud and the loopback API both speak to.

Rules are those of the TPU API v2 as far as the fleet depends on them. Faults are scripted: a list of
{"on": "create", "zone": ..., "name": ..., "do": ..., "times": n}, the first that fits is used up.
"""

import contextlib
import fcntl
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NODES, QUEUE = "nodes", "queuedResources"
PLACE = re.compile(r"[a-z]+-[a-z]+[0-9]+-[a-z]")
NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
STOCKOUT = (
    'There is no more capacity in the zone "{zone}"; you can try in another zone where Cloud TPU Nodes are offered '
    "(see https://cloud.google.com/tpu/docs/regions) [EID: 0xba393c906974e61]"
)


class ApiError(Exception):
    """An answer of the API that is no success: gRPC code, its name and a message."""

    def __init__(self, code: int, status: str, message: str) -> None:
        super().__init__(message)
        self.code, self.status, self.message = code, status, message


class FakeTpus:
    """The service. Every use reads the file, works, and writes it back, under a lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            path.write_text(json.dumps({NODES: {}, QUEUE: {}, "faults": [], "calls": [], "created": 0}))

    @contextlib.contextmanager
    def state(self) -> Iterator[dict[str, Any]]:
        """The state to look at or to change."""
        with self.path.open("r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            state = json.load(stream)
            yield state
            stream.seek(0)
            stream.truncate()
            json.dump(state, stream)

    def put(self, zone: str, name: str, state: str, **fields: Any) -> None:
        """A node that is there already, ours unless `labels` says otherwise."""
        with self.state() as all_of_it:
            all_of_it[NODES][f"{zone}/{name}"] = _node(zone, name, state, fields)

    def put_queued(self, zone: str, name: str, state: str, **fields: Any) -> None:
        """A queued resource that is there already."""
        node = _node(zone, name, state, fields)
        kept = {key: node[key] for key in ("labels", "acceleratorType", "runtimeVersion")}
        record = {
            "name": f"projects/p/locations/{zone}/{QUEUE}/{name}",
            "state": {"state": state},
            "tpu": {"nodeSpec": [{"nodeId": name, "node": kept}]},
            "spot": {},
        }
        with self.state() as all_of_it:
            all_of_it[QUEUE][f"{zone}/{name}"] = record

    def set_state(self, zone: str, name: str, state: str) -> None:
        """What the cloud does to a node."""
        with self.state() as all_of_it:
            all_of_it[NODES][f"{zone}/{name}"]["state"] = state

    def fail(self, on: str, do: str, times: int = 1, **where: str) -> None:
        """Scripts a fault."""
        with self.state() as all_of_it:
            all_of_it["faults"].append({"on": on, "do": do, "times": times} | where)

    def meanwhile(self, what: str | None) -> None:
        """What happens between a listing and what is done about it, to all that is PREEMPTED."""
        fields = {"after give_away": {"labels": {}}, "after recover": {"state": "READY"}}.get(what or "", {})
        with self.state() as all_of_it:
            for node in all_of_it[NODES].values():
                if node["state"] == "PREEMPTED":
                    node.update(fields)

    def nodes(self) -> dict[str, str]:
        """State by zone/name."""
        with self.state() as state:
            return {key: node["state"] for key, node in state[NODES].items()}

    def queue(self) -> dict[str, str]:
        """State by zone/name."""
        with self.state() as state:
            return {key: record["state"]["state"] for key, record in state[QUEUE].items()}

    def node(self, key: str) -> dict[str, Any]:
        """One node's record."""
        with self.state() as state:
            return dict(state[NODES][key])

    def calls(self, *verbs: str) -> list[str]:
        """Calls so far as 'verb zone name', those of the verbs or all."""
        with self.state() as state:
            return [call for call in state["calls"] if not verbs or call.split()[0] in verbs]

    def note(self, verb: str, zone: str, name: str) -> str | None:
        """Notes a call and returns the fault that is scripted for it."""
        with self.state() as state:
            state["calls"].append(f"{verb} {zone} {name}".strip())
            for fault in state["faults"]:
                fits = fault["on"] == verb and fault.get("zone", zone) == zone and fault.get("name", name) == name
                if fits and fault["times"] > 0:
                    fault["times"] -= 1
                    return str(fault["do"])
        return None

    def list(self, collection: str, zone: str) -> list[dict[str, Any]]:
        """The records of a zone; `-` is all."""
        with self.state() as state:
            return [record for key, record in state[collection].items() if zone in ("-", key.split("/")[0])]

    def get(self, collection: str, zone: str, name: str) -> dict[str, Any]:
        """One record."""
        with self.state() as state:
            return dict(_existing(state, collection, zone, name))

    def create_node(self, zone: str, name: str, body: dict[str, Any]) -> None:
        """Adds a node, at once READY."""
        _require_place(zone, name)
        with self.state() as state:
            if f"{zone}/{name}" in state[NODES]:
                raise ApiError(
                    6, "ALREADY_EXISTS", f"Resource 'projects/p/locations/{zone}/nodes/{name}' already exists"
                )
            state["created"] += 1
            state[NODES][f"{zone}/{name}"] = body | {
                "name": f"projects/p/locations/{zone}/nodes/{name}",
                "state": "READY",
                "apiVersion": "V2",
                "id": str(state["created"]),
            }

    def create_queued(self, zone: str, name: str, body: dict[str, Any]) -> None:
        """Adds a queued resource, waiting."""
        _require_place(zone, name)
        with self.state() as state:
            if f"{zone}/{name}" in state[QUEUE]:
                raise ApiError(6, "ALREADY_EXISTS", f"Resource '{name}' already exists")
            place = {"name": f"projects/p/locations/{zone}/{QUEUE}/{name}", "state": {"state": "ACCEPTED"}}
            state[QUEUE][f"{zone}/{name}"] = body | place

    def delete_node(self, zone: str, name: str) -> None:
        """Removes a node; one that a queued resource made is removed with that alone."""
        with self.state() as state:
            _existing(state, NODES, zone, name)
            if f"{zone}/{name}" in state[QUEUE]:
                raise ApiError(9, "FAILED_PRECONDITION", "the node belongs to a queued resource: delete that")
            del state[NODES][f"{zone}/{name}"]

    def delete_queued(self, zone: str, name: str, *, force: bool) -> None:
        """Removes a queued resource, with its node when forced."""
        with self.state() as state:
            _existing(state, QUEUE, zone, name)
            if f"{zone}/{name}" in state[NODES] and not force:
                raise ApiError(9, "FAILED_PRECONDITION", "the queued resource has nodes: use --force")
            state[NODES].pop(f"{zone}/{name}", None)
            del state[QUEUE][f"{zone}/{name}"]


def _node(zone: str, name: str, state: str, fields: dict[str, Any]) -> dict[str, Any]:
    index = name.rpartition("-")[2]
    ours = {"activations-fleet": "activations", "activations-worker": index if index.isdigit() else "0"}
    return {
        "name": f"projects/p/locations/{zone}/nodes/{name}",
        "state": state,
        "apiVersion": "V2",
        "acceleratorType": "v5litepod-8",
        "runtimeVersion": "v2-alpha-tpuv5-lite",
        "schedulingConfig": {"spot": True},
        "labels": ours,
    } | fields


def _existing(state: dict[str, Any], collection: str, zone: str, name: str) -> dict[str, Any]:
    if f"{zone}/{name}" not in state[collection]:
        message = f"Resource 'projects/p/locations/{zone}/{collection}/{name}' was not found"
        raise ApiError(5, "NOT_FOUND", message)
    return state[collection][f"{zone}/{name}"]


def _require_place(zone: str, name: str) -> None:
    if not PLACE.fullmatch(zone) or not NAME.fullmatch(name):
        raise ApiError(3, "INVALID_ARGUMENT", f"invalid name {zone}/{name}")
