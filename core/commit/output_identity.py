"""Identity files of an output: written once, create-only; a run with another identity is refused."""

import json
from typing import Any

from core.base.canonical_json import canonical_json
from core.base.errors import RunError, UsageError
from core.base.fault_points import fault_point
from core.commit.identity import differing_fields
from core.object_store import Created, ObjectStore

RUN_FILE = "run.json"
STREAM_FILE = "stream.json"
DATASET_FILE = "dataset.json"
_SHOWN_DIFFERENCES = 8


def check_identity(store: ObjectStore, name: str, wanted: dict[str, Any]) -> None:
    """Raises UsageError naming the fields that differ when the file `name` exists and is not `wanted`."""
    try:
        stored = json.loads(store.read_bytes(name))
    except FileNotFoundError:
        return
    except ValueError as error:
        raise RunError(f"{store.url}/{name} is not JSON ({error}): use another --output_dir") from error
    if not isinstance(stored, dict):
        raise RunError(f"{store.url}/{name} is not a JSON object: use another --output_dir")
    differences = differing_fields(stored, wanted)
    if len(differences) == 1 and differences[0].startswith("parts:") and type(stored.get("parts", 1)) is int:
        # Jobs with different numbers of hosts started at once: after a restart, the later one uses the stored number.
        raise RunError(f"{store.url}/{name}: another job has just started this output ({differences[0]}): start again")
    if differences:
        more = f"; {len(differences) - _SHOWN_DIFFERENCES} more" * (len(differences) > _SHOWN_DIFFERENCES)
        other_worker = " another --worker_id," * name.endswith(STREAM_FILE)
        raise UsageError(
            f"{store.url}/{name} belongs to another run ({'; '.join(differences[:_SHOWN_DIFFERENCES])}{more}): "
            f"use the same flags,{other_worker} or another --output_dir"
        )


def write_identity(store: ObjectStore, name: str, wanted: dict[str, Any]) -> None:
    """Writes an identity file, create-only; raises UsageError when it exists with another identity."""
    fault_point("declare.before")
    if store.create_bytes(name, canonical_json(wanted)) is Created.ALREADY_DIFFERENT:
        check_identity(store, name, wanted)
    fault_point("declare.after")
