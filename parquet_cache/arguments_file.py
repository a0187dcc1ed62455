"""`arguments.json`: what the files of a folder were made with, beside them."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from core.base.canonical_json import canonical_json
from core.base.errors import RunError, UsageError
from core.object_store import ObjectStore
from core.object_store.base import Created
from parquet_cache.options import PrepareOptions

NAME = "arguments.json"
# Where things lie and how they are computed; what they are is in the digests.
_FREE = ("output_dir", "device", "max_bad_records", "ds_repo", "model_checkpoint", "tokenizer_path", "revision")
# `n_pos`, `layers` and `batch_size` are compared as they were resolved.
_RESOLVED = ("n_pos", "layers", "batch_size", "auto_find_batch_size")


def read_arguments(store: ObjectStore) -> dict[str, Any] | None:
    """The stored arguments; None in a folder without them. Raises RunError for a file that is no such thing."""
    try:
        stored = json.loads(store.read_bytes(NAME))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{store.url}/{NAME}: {error}") from None
    if not isinstance(stored, dict) or not isinstance(stored.get("arguments"), dict):
        raise RunError(f"{store.url}/{NAME}: it was not written by prepare.py")
    return stored


def arguments_of(options: PrepareOptions, resolved: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored: the flags as they were given, their values where a default was resolved, what was found.

    found: digests and counts of the model and the dataset.
    """
    return {"arguments": dataclasses.asdict(options), "resolved": dict(resolved), "found": dict(found)}


def require_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], url: str) -> None:
    """Raises UsageError naming the fields in which a folder's files would differ from those that it has."""
    differing = [
        f"{name} is {old!r} there and {new!r} here"
        for name, old, new in _pairs(json.loads(canonical_json(stored)), json.loads(canonical_json(wanted)))
        if old != new
    ]
    if differing:
        raise UsageError(f"{url} was made with other arguments: {'; '.join(differing)}: choose another --output_dir")


def _pairs(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    pairs = []
    for part in ("arguments", "resolved", "found"):
        old, new = stored.get(part, {}), wanted[part]
        free = (*_FREE, *_RESOLVED) if part == "arguments" else ()
        pairs += [(name, old.get(name), new.get(name)) for name in {**new, **old} if name not in free]
    return pairs


def write_arguments(store: ObjectStore, wanted: Mapping[str, Any]) -> None:
    """Create-only. Raises RunError where another process wrote others meanwhile."""
    if store.create_bytes(NAME, canonical_json(wanted)) is Created.ALREADY_DIFFERENT:
        raise RunError(f"{store.url}/{NAME}: another process has written other arguments: run the command again")
