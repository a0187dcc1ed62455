"""What is committed in an output: its identity, and its parts in order, by the commit records alone."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from core.base.canonical_json import content_hash
from core.base.errors import RunError, UsageError
from core.commit.output_identity import RUN_FILE, STREAM_FILE
from core.commit.record import RECORD_NAME, CommitRecord
from core.commit.stored_records import read_records
from core.object_store import ObjectStore, open_store
from core.reading.damage import damage
from core.reading.restoring import StoredForm
from core.reading.shard_part import ShardPart
from core.shards.formats import FORMATS


@dataclass(frozen=True)
class Catalog:
    """The committed content of an output.

    Attributes:
      url: of the output. identity: what `run.json` holds.
      parts: folder by folder, window by window; parts without samples are left out.
    """

    url: str
    identity: dict[str, Any]
    parts: tuple[ShardPart, ...]


def read_catalog(url: str) -> Catalog:
    """Lists the output at `url`, or one worker's folder in it, and reads its records.

    Windows that are being written have no record yet and are not seen.
    Raises UsageError when there is no run at `url`, RunError when a record is damaged, missing or of another run.
    """
    store, names, only = _listed(url.rstrip("/") or "/")
    identity = _identity(store)
    plan_hash = content_hash(identity)
    parts: list[ShardPart] = []
    for folder in _folders(names) if only is None else [only]:
        for record in read_records(store, folder):
            where = f"{folder}/shard_{record.window:04d}.json"
            with damage(store.url, where):
                if record.plan_hash != plan_hash:
                    raise ValueError(f"it was written by another run than {RUN_FILE}")
                parts += _parts(store.url, folder, record, identity["format"])
    return Catalog(store.url, identity, tuple(parts))


def _listed(url: str) -> tuple[ObjectStore, Sequence[str], str | None]:
    """The store of the output, its names, and the folder when `url` is that of one worker's folder."""
    store = open_store(url)
    names = store.list()
    if RUN_FILE in names:
        return store, names, None
    if STREAM_FILE in names:
        parent, _, folder = store.url.rpartition("/")
        store = open_store(parent)
        return store, store.list(f"{folder}/"), folder
    raise UsageError(f"{url}: no run here: pass the folder with {RUN_FILE}, which a run writes with its first shard")


def _identity(store: ObjectStore) -> dict[str, Any]:
    with damage(store.url, RUN_FILE):
        identity = json.loads(store.read_bytes(RUN_FILE))
        if not isinstance(identity, dict) or identity.get("format") not in FORMATS:
            raise ValueError(f"it names no format among {', '.join(FORMATS)}")
        return identity


def _folders(names: Iterable[str]) -> list[str]:
    """Every folder with a commit record, in the order of their names."""
    parts = (name.rpartition("/") for name in names)
    return sorted({folder for folder, _, name in parts if folder and RECORD_NAME.fullmatch(name)})


def _parts(root: str, folder: str, record: CommitRecord, shard_format: str) -> Iterator[ShardPart]:
    for stored in record.sites.values():
        StoredForm.of(stored, record.dtype)
    for number, (counts, files) in enumerate(record.files_of_parts()):
        if counts.first_sample_idx is None or counts.last_sample_idx is None or not counts.n_samples:
            continue
        yield ShardPart(
            root=root,
            folder=folder,
            window=record.window,
            part=number,
            format=shard_format,
            n_samples=counts.n_samples,
            n_tokens=counts.n_tokens,
            first_sample_idx=counts.first_sample_idx,
            last_sample_idx=counts.last_sample_idx,
            n_rows=counts.n_samples * len(record.pools) if record.pools else counts.n_tokens,
            dtype=record.dtype,
            sites=record.sites,
            pools=record.pools,
            files=tuple(files),
        )


def require_alike(parts: Sequence[ShardPart]) -> None:
    """Raises RunError naming two parts that do not store the same sites and layers in the same form."""
    for one, other in itertools.pairwise(parts):
        if (one.sites, one.dtype, one.pools) != (other.sites, other.dtype, other.pools):
            raise RunError(f"{one.root}: {one.folder} and {other.folder} store different sites or layers")
