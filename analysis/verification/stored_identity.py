"""Reads and checks the identity files of an output; their contents are untrusted."""

from dataclasses import dataclass
from typing import Any

from core.base.canonical_json import canonical_json, content_hash
from core.base.errors import RunError
from core.base.json_types import NONE, Kinds, mistyped
from core.commit.identity import StreamIdentity
from core.commit.output_identity import DATASET_FILE, RUN_FILE, STREAM_FILE
from core.object_store import ObjectStore
from core.object_store.single_file import read_json_object
from core.shards.formats import FORMATS
from core.streams.sharded_dataset import SHARD_NAME

_STREAM: Kinds = {
    "identity": (dict,),
    "machine_id": (int,),
    "total_machines": (int,),
    "max_tasks": (int, NONE),
    "first_position": (int,),
}


@dataclass(frozen=True)
class StoredRunIdentity:
    """The fields of run.json needed here: the format of the shards, and the hash that must be in the records."""

    format: str
    hash: str


@dataclass(frozen=True)
class StoredStream:
    """The content of stream.json, and the hash that must be in the records."""

    stream: StreamIdentity
    hash: str


def read_object(store: ObjectStore, name: str) -> dict[str, Any]:
    """The JSON object stored under `name`; raises RunError naming the file when it is missing or unreadable."""
    try:
        return read_json_object(store, name)
    except FileNotFoundError as error:
        raise RunError(f"{store.url}/{name} is missing") from error


def _read_written(store: ObjectStore, name: str) -> dict[str, Any]:
    """The same for a file whose every byte counts, including spaces: runs compare it with what they would write."""
    value = read_object(store, name)
    if canonical_json(value) != store.read_bytes(name):
        raise RunError(f"{store.url}/{name} was damaged or changed after it was written")
    return value


def read_run(store: ObjectStore) -> StoredRunIdentity:
    """run.json; raises RunError when it is unreadable or names no format."""
    value = _read_written(store, RUN_FILE)
    name = value.get("format")
    if not isinstance(name, str) or name not in FORMATS:
        raise RunError(f"{store.url}/{RUN_FILE}: its format is {name!r}, expected one of {', '.join(FORMATS)}")
    return StoredRunIdentity(name, content_hash(value))


def read_stream(store: ObjectStore, folder: str) -> StoredStream:
    """A folder's stream.json; raises RunError when it is unreadable or invalid."""
    name = f"{folder}/{STREAM_FILE}"
    value = _read_written(store, name)
    return StoredStream(_stream_identity(value, f"{store.url}/{name}"), content_hash(value))


@dataclass(frozen=True)
class StoredDatasetShard:
    """A shard of the dataset: its stream, and how many of its lines must be extracted."""

    stream: StreamIdentity
    num_tasks: int

    @property
    def first_task(self) -> int:
        """The position of its first line in the dataset."""
        return self.stream.first_position


def read_dataset_shards(store: ObjectStore) -> dict[str, StoredDatasetShard]:
    """The shards of dataset.json; raises RunError when it is unreadable or invalid."""
    where = f"{store.url}/{DATASET_FILE}"
    value = _read_written(store, DATASET_FILE)
    wrong = mistyped(value, {"shards": (dict,), "num_tasks": (dict,)})
    if wrong is None and value["shards"].keys() != value["num_tasks"].keys():
        wrong = "num_tasks"
    if wrong is None:
        wrong = mistyped(value["num_tasks"], dict.fromkeys(value["num_tasks"], (int,)))
    if wrong is not None:
        raise RunError(f"{where}: {wrong!r} is missing or of the wrong type")
    invalid = [shard for shard in value["shards"] if not SHARD_NAME.fullmatch(shard)]
    if invalid:
        raise RunError(f"{where}: {invalid[0]!r} is not the name of a shard")
    return {
        shard: StoredDatasetShard(_stream_identity(stream, f"{where}: {shard}"), value["num_tasks"][shard])
        for shard, stream in value["shards"].items()
    }


def _stream_identity(value: Any, where: str) -> StreamIdentity:
    value = {"first_position": 0} | value if isinstance(value, dict) else value
    wrong = mistyped(value, _STREAM)
    if wrong is not None:
        raise RunError(f"{where}: {wrong!r} is missing or of the wrong type")
    identity = StreamIdentity(**{name: value[name] for name in _STREAM})
    if not 0 <= identity.machine_id < identity.total_machines:
        raise RunError(
            f"{where}: machine_id {identity.machine_id} is not below total_machines {identity.total_machines}"
        )
    return identity
