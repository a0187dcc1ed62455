"""What an output says of its export: which one it is, and which files are finished, so that it can be continued.

.export.json         the identity of an export that is not finished; create-only
.export-00003.json   written after file 3: its name, size and counts
export.json          identity, files and counts of a finished export; the others are removed
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from analysis.exporting.files import ExportedFile
from core.base.canonical_json import canonical_json
from core.base.errors import UsageError
from core.commit.identity import differing_fields
from core.object_store import ObjectStore
from core.object_store.single_file import read_json_object

_BEGUN, _FINISHED = ".export.json", "export.json"
_FILE = re.compile(r"\.export-[0-9]{5,}\.json")


def begin(store: ObjectStore, identity: dict[str, Any]) -> dict[int, ExportedFile]:
    """The finished files of this export in `store`, by number; nothing but its identity is written.

    Raises UsageError if the folder holds something else, or another export.
    """
    sizes = {entry.name: entry.size for entry in store.listing().entries}
    known = next((name for name in (_FINISHED, _BEGUN) if name in sizes), None)
    if known is None and sizes:
        raise UsageError(f"{store.url} is not empty and holds no export: use another --output")
    if known is None:
        store.create_bytes(_BEGUN, canonical_json({"identity": identity}))
        return {}
    stored = read_json_object(store, known)
    differences = differing_fields(stored.get("identity", {}), json.loads(canonical_json(identity)))
    if differences:
        raise UsageError(f"{store.url} holds another export ({'; '.join(differences[:8])}): use another --output")
    written = (read_json_object(store, name) for name in sizes if _FILE.fullmatch(name))
    files = [ExportedFile(**record) for record in (stored["files"] if known == _FINISHED else written)]
    return {file.number: file for file in files if sizes.get(file.name) == file.bytes}


def add_file(store: ObjectStore, file: ExportedFile) -> None:
    """Records a finished file."""
    store.replace_bytes(f".export-{file.number:05d}.json", canonical_json(file.to_json()))


def finish(store: ObjectStore, identity: dict[str, Any], files: Sequence[ExportedFile], counts: dict[str, int]) -> None:
    """Marks the export as finished."""
    listed = [file.to_json() | {"more": {}} for file in files]
    data = canonical_json({"identity": identity, "counts": counts, "files": listed})
    store.create_bytes(_FINISHED, data)
    for name in store.list():
        if name == _BEGUN or _FILE.fullmatch(name):
            store.delete(name)


def is_finished(store: ObjectStore) -> bool:
    """Whether the export was finished before."""
    return bool(store.info(_FINISHED))
