"""The files in an output's folder `claims/`, and the state of each dataset shard that follows from them.

    claims/<shard>/000001.json         lease of epoch 1: its owner, and the owner that it replaces; create-only
    claims/<shard>/000001.beat         its owner's last heartbeat, replaced at every heartbeat
    claims/<shard>/000001.released     its release and the reason; create-only
    claims/<shard>/failures/000.json   an error of the shard's data; create-only
    claims/<shard>/poisoned.json       the error that recurs: no worker claims the shard any more; create-only

Contents are untrusted, and checked before they are used.
"""

import json
import os
import re
import socket
import uuid
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

from core.base.canonical_json import read_sealed_json
from core.base.errors import RunError
from core.base.json_types import NONE, Kinds, require_types
from core.object_store import ObjectStore

CLAIMS_FOLDER = "claims"
POISON_AFTER = 3
"""A shard is set aside after this many failures with the same error."""
POISON_AFTER_ANY = 10
"""A shard is set aside after this many failures of any kind: errors may contain text that differs each time."""

Reason = Literal["done", "stopped", "failed"]

_LEASE_FILE = re.compile(r"([0-9]{6,})\.(json|beat|released)")
_FAILURE_FILE = re.compile(r"failures/[0-9]{3,}\.json")
_POISONED_FILE = "poisoned.json"
_OWNER: Kinds = {"worker_id": (int,), "host": (str,), "pid": (int,), "nonce": (str,)}
_LEASE: Kinds = {
    "shard": (str,),
    "epoch": (int,),
    "owner": (dict,),
    "replaces": (dict, NONE),
    "heartbeat_s": (int, float),
    "ttl_s": (int, float),
}
_RELEASE: Kinds = {"reason": (str,), "owner": (dict,)}
_FAILURE: Kinds = {"error": (str,), "owner": (dict,), "epoch": (int,)}
_POISONED: Kinds = {"error": (str,), "failures": (int,)}
_READ_THREADS = 16


@dataclass(frozen=True)
class Owner:
    """One start of one process: `nonce` is unique, even among workers with the same id."""

    worker_id: int
    host: str
    pid: int
    nonce: str

    @classmethod
    def of_this_process(cls, worker_id: int) -> "Owner":
        """A new owner."""
        return cls(worker_id, socket.gethostname(), os.getpid(), uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"worker {self.worker_id} on {self.host}, process {self.pid}"


@dataclass(frozen=True)
class LeaseRecord:
    """A lease as it is stored.

    Attributes:
      replaces: the owner whose expired or released lease this one follows, or None.
      heartbeat_s, ttl_s: its owner's flags; an observer takes the shard over after its own TTL.
    """

    shard: str
    epoch: int
    owner: Owner
    replaces: Owner | None
    heartbeat_s: float
    ttl_s: float


@dataclass(frozen=True)
class ClaimState:
    """The state of a shard by a listing of its claims. `epoch` 0: never claimed.

    Attributes:
      beat: version of the latest lease's heartbeat file; None where there is none, or the listing had no versions.
    """

    epoch: int = 0
    is_released: bool = False
    failures: tuple[str, ...] = ()
    is_poisoned: bool = False
    beat: str | None = None

    @property
    def is_held(self) -> bool:
        """Whether the latest lease has not been released; it may have expired."""
        return self.epoch > 0 and not self.is_released


def read_claims(store: ObjectStore) -> dict[str, ClaimState]:
    """The claims in an output folder by shard, from one listing."""
    versions = {entry.name: entry.version for entry in store.listing(f"{CLAIMS_FOLDER}/").entries}
    return {
        shard: replace(state, beat=versions.get(lease_file(shard, state.epoch, "beat")))
        for shard, state in claims_from_names(versions).items()
    }


def claims_from_names(names: Iterable[str]) -> dict[str, ClaimState]:
    """The claims by shard, from the names in an output folder."""
    by_shard: dict[str, list[str]] = {}
    for name in names:
        if name.startswith(f"{CLAIMS_FOLDER}/"):
            _, shard, *rest = name.split("/", 2)
            by_shard.setdefault(shard, []).extend(rest)
    return {shard: _state_of(shard, found) for shard, found in by_shard.items()}


def read_lease(store: ObjectStore, shard: str, epoch: int) -> LeaseRecord:
    """A stored lease. Raises RunError when it is gone or damaged."""
    value = _read(store, lease_file(shard, epoch, "json"), _LEASE, "owner", "replaces")
    owner, replaces = (None if value[name] is None else _owner(value[name]) for name in ("owner", "replaces"))
    assert owner is not None
    return LeaseRecord(value["shard"], value["epoch"], owner, replaces, value["heartbeat_s"], value["ttl_s"])


def _owner(value: dict[str, Any]) -> Owner:
    return Owner(*(value[name] for name in _OWNER))


def read_release(store: ObjectStore, shard: str, epoch: int) -> str:
    """Why a lease was released. Raises RunError when the file is gone or damaged."""
    return _read(store, lease_file(shard, epoch, "released"), _RELEASE, "owner")["reason"]


def read_beat(store: ObjectStore, shard: str, epoch: int) -> dict[str, Any]:
    """The integers in the last heartbeat of a lease; empty when there is none, or it is unreadable."""
    try:
        value = json.loads(store.read_bytes(lease_file(shard, epoch, "beat")))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return {name: count for name, count in value.items() if type(count) is int} if isinstance(value, dict) else {}


def poison_error(store: ObjectStore, shard: str, state: ClaimState) -> str | None:
    """The error for which a shard is set aside; None when it is not. Raises RunError when a claim is damaged."""
    if state.is_poisoned:
        return _read(store, poisoned_file(shard), _POISONED)["error"]
    if len(state.failures) < POISON_AFTER:
        return None
    errors = Counter(_read(store, name, _FAILURE, "owner")["error"] for name in state.failures)
    error, times = errors.most_common(1)[0]
    if times >= POISON_AFTER:
        return error
    if len(state.failures) >= POISON_AFTER_ANY:
        return f"{len(state.failures)} different errors, such as: {error}"
    return None


def clear_failures(store: ObjectStore, shard: str) -> int:
    """Deletes the failures of a shard, so that it is claimed again. Returns how many there were."""
    state = read_claims(store).get(shard, ClaimState())
    # poisoned.json goes last: a worker that sees failures without it would write it again.
    for name in (*state.failures, poisoned_file(shard)):
        store.delete(name)
    return len(state.failures)


def damaged_claims(store: ObjectStore, names: Iterable[str]) -> list[str]:
    """The claims among the names of an output whose content is damaged."""
    claims = [name for name in names if name.startswith(f"{CLAIMS_FOLDER}/")]
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        is_whole = list(pool.map(lambda name: _is_whole(store, name), claims))
    return [name for name, whole in zip(claims, is_whole, strict=True) if not whole]


def _is_whole(store: ObjectStore, name: str) -> bool:
    try:
        read_sealed_json(store.read_bytes(name))
    except FileNotFoundError:
        return True
    except (ValueError, RecursionError):
        return False
    return True


def _read(store: ObjectStore, name: str, kinds: Kinds, *owners: str) -> dict[str, Any]:
    """A claim with these fields; each of the fields `owners` is an owner or null."""
    try:
        value = read_sealed_json(store.read_bytes(name))
        require_types(value, kinds)
        for field_name in owners:
            if value[field_name] is not None:
                require_types(value[field_name], _OWNER, f"{field_name}.")
        return value
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise RunError(
            f"{store.url}/{name}: the claim is gone or damaged ({error}): stop all workers, remove the folder "
            f"{CLAIMS_FOLDER} and start them again; no committed work is lost"
        ) from error


def _state_of(shard: str, names: list[str]) -> ClaimState:
    matches = [match for match in map(_LEASE_FILE.fullmatch, names) if match]
    epoch = max((int(match[1]) for match in matches if match[2] == "json"), default=0)
    is_released = any(int(match[1]) == epoch and match[2] == "released" for match in matches)
    failures = [f"{CLAIMS_FOLDER}/{shard}/{name}" for name in names if _FAILURE_FILE.fullmatch(name)]
    return ClaimState(epoch, is_released, tuple(sorted(failures)), _POISONED_FILE in names)


def lease_file(shard: str, epoch: int, kind: Literal["json", "beat", "released"]) -> str:
    """The name of a file of a lease."""
    return f"{CLAIMS_FOLDER}/{shard}/{epoch:06d}.{kind}"


def failure_file(shard: str, index: int) -> str:
    """The name of the file of a failure; `index` counts from 0."""
    return f"{CLAIMS_FOLDER}/{shard}/failures/{index:03d}.json"


def poisoned_file(shard: str) -> str:
    """The name of the file that marks a shard as set aside."""
    return f"{CLAIMS_FOLDER}/{shard}/{_POISONED_FILE}"
