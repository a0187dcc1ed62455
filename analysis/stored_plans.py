"""Reads the JSON files of an output that say what it is for, and takes nothing in them on trust."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from core.activation_storage import DATASET_FILE, RUN_FILE, STREAM_FILE, CommitRecord
from core.errors import RunError
from core.formats import DTYPES, FORMATS
from core.object_store import ObjectStore
from core.plan import StreamPlan, content_hash

Kinds = Mapping[str, tuple[type, ...]]

_NONE = type(None)
_STREAM: Kinds = {
    "identity": (dict,),
    "machine_id": (int,),
    "total_machines": (int,),
    "max_tasks": (int, _NONE),
    "first_position": (int,),
}
_RECORD: Kinds = {
    "plan_hash": (str,),
    "stream_hash": (str,),
    "n_samples": (int,),
    "n_tokens": (int,),
    "samples_per_record": (int,),
    "widths": (dict,),
    "dtype": (str,),
    "next_place": (dict, _NONE),
}
_FILE: Kinds = {"name": (str,), "site": (str, _NONE), "bytes": (int,), "crc32c": (str,), "sha256": (str,)}


@dataclass(frozen=True)
class StoredPlan:
    """What is needed of run.json: the format of the shards, and the hash that the records must carry."""

    format: str
    hash: str


@dataclass(frozen=True)
class StoredStream:
    """What stream.json says, and the hash that the records must carry."""

    plan: StreamPlan
    hash: str


def read_object(store: ObjectStore, name: str) -> dict[str, Any]:
    """The JSON object stored under `name`; raises RunError naming the file when there is none to be had."""
    where = f"{store.url}/{name}"
    try:
        value = json.loads(store.read_bytes(name))
    except FileNotFoundError as error:
        raise RunError(f"{where} is missing") from error
    except OSError as error:
        raise RunError(f"{where} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{where} is not a JSON object")
    return value


def read_run(store: ObjectStore) -> StoredPlan:
    """run.json; raises RunError when it is unreadable or names no format."""
    value = read_object(store, RUN_FILE)
    name = value.get("format")
    if not isinstance(name, str) or name not in FORMATS:
        raise RunError(f"{store.url}/{RUN_FILE}: its format is {name!r}, expected one of {', '.join(FORMATS)}")
    return StoredPlan(name, content_hash(value))


def read_stream(store: ObjectStore, folder: str) -> StoredStream:
    """A folder's stream.json; raises RunError when it is unreadable or says nothing that could be."""
    name = f"{folder}/{STREAM_FILE}"
    value = read_object(store, name)
    return StoredStream(_stream_plan(value, f"{store.url}/{name}"), content_hash(value))


def read_dataset_shards(store: ObjectStore) -> dict[str, StreamPlan]:
    """The streams of dataset.json by shard; raises RunError when it is unreadable or says nothing that could be."""
    where = f"{store.url}/{DATASET_FILE}"
    shards = read_object(store, DATASET_FILE).get("shards")
    if not isinstance(shards, dict):
        raise RunError(f"{where}: 'shards' is missing or of the wrong type")
    return {shard: _stream_plan(value, f"{where}: {shard}") for shard, value in shards.items()}


def _stream_plan(value: Any, where: str) -> StreamPlan:
    value = {"first_position": 0} | value if isinstance(value, dict) else value
    wrong = mistyped(value, _STREAM)
    if wrong is not None:
        raise RunError(f"{where}: {wrong!r} is missing or of the wrong type")
    plan = StreamPlan(**{name: value[name] for name in _STREAM})
    if not 0 <= plan.machine_id < plan.total_machines:
        raise RunError(f"{where}: machine_id {plan.machine_id} of total_machines {plan.total_machines} cannot be")
    return plan


def record_fault(record: CommitRecord) -> str | None:
    """What makes a commit record impossible, so that nothing can be checked against it; None for a sound one."""
    wrong = mistyped(asdict(record), _RECORD)
    parts: list[tuple[str, Any, Kinds]] = [("files", asdict(file), _FILE) for file in record.files]
    parts += [("bad_records", bad, {"position": (int,)}) for bad in record.bad_records]
    if record.next_place is not None:
        parts.append(("next_place", asdict(record.next_place), {"position": (int,), "sample_idx": (int,)}))
    parts += [("layers", {"layer": layer}, {"layer": (int,)}) for layer in record.layers]
    wrong = wrong or next((name for name, part, kinds in parts if mistyped(part, kinds) is not None), None)
    if wrong is not None:
        return f"{wrong!r} is of the wrong type"
    if record.samples_per_record < 1 or record.dtype not in DTYPES:
        return f"samples_per_record {record.samples_per_record} with dtype {record.dtype!r} cannot be"
    if any(type(record.widths.get(file.site)) is not int for file in record.files if file.site is not None):
        return "'widths' lacks a site of its files"
    return None


def mistyped(value: Any, kinds: Kinds) -> str | None:
    """The first field that `value` lacks or holds in another type; None when all are right."""
    if not isinstance(value, dict):
        return next(iter(kinds))
    # type(), for isinstance takes True for a number.
    return next((name for name, allowed in kinds.items() if type(value.get(name, kinds)) not in allowed), None)
