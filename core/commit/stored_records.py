"""Reads the commit records of a folder, and builds its metadata.json from them."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from absl import logging

from core.base.canonical_json import read_sealed_json
from core.base.errors import RunError
from core.commit.record import RECORD_NAME, CommitRecord
from core.object_store import ObjectStore
from core.reduce.losses import total_losses

METADATA_FILE = "metadata.json"
# Reading the records of a long run is bound by latency, not bandwidth.
_READ_THREADS = 16


def committed_records(store: ObjectStore, folder: str) -> list[CommitRecord]:
    """The records of a folder, up to the first that is missing or has a missing file.

    A run continues after these: later windows are extracted again, and their files that still exist are reused.
    """
    names = set(store.list(f"{folder}/"))
    by_window = _record_names(names, folder)
    consecutive = list(itertools.takewhile(lambda window: window in by_window, itertools.count(1)))
    records = _read_all(store, by_window, consecutive)
    complete = itertools.takewhile(lambda r: all(f"{folder}/{file.name}" in names for file in r.files), records)
    kept = list(complete)
    if len(kept) < len(by_window):
        logging.warning("%s/%s: window %d is damaged: continuing from there", store.url, folder, len(kept) + 1)
    return kept


def has_current_metadata(store: ObjectStore, folder: str, records: Sequence[CommitRecord]) -> bool:
    """Whether a folder's metadata.json is undamaged and matches these records."""
    try:
        metadata = read_sealed_json(store.read_bytes(f"{folder}/{METADATA_FILE}"))
    except (FileNotFoundError, ValueError):
        return False
    return metadata.items() >= folder_metadata(records).items()


def read_records(store: ObjectStore, folder: str) -> list[CommitRecord]:
    """Every commit record of a folder in window order; raises RunError when one is unreadable or missing."""
    by_window = _record_names(store.list(f"{folder}/"), folder)
    missing = sorted(set(range(1, max(by_window, default=0) + 1)) - by_window.keys())
    if missing:
        raise RunError(
            f"{store.url}/{folder}: window {missing[0]} has no commit record but later ones have: "
            "run the same extraction again"
        )
    return _read_all(store, by_window, sorted(by_window))


def _record_names(names: Iterable[str], folder: str) -> dict[int, str]:
    matches = ((RECORD_NAME.fullmatch(name.removeprefix(f"{folder}/")), name) for name in names)
    return {int(match.group(1)): name for match, name in matches if match}


def _read_all(store: ObjectStore, by_window: dict[int, str], windows: Sequence[int]) -> list[CommitRecord]:
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return list(pool.map(lambda window: _read_record(store, by_window[window], window), windows))


def _read_record(store: ObjectStore, name: str, window: int) -> CommitRecord:
    try:
        record = CommitRecord.from_bytes(store.read_bytes(name))
    except ValueError as error:
        raise RunError(f"{store.url}/{name}: {error}") from error
    if record.window != window:
        raise RunError(f"{store.url}/{name}: it is the record of window {record.window}")
    return record


def folder_metadata(records: Sequence[CommitRecord]) -> dict[str, Any]:
    """The content of metadata.json: totals, and one entry for each shard file."""
    shards = [
        {
            "shard_id": record.window,
            "filename": file.name,
            "file_size": file.bytes,
            "site": file.site,
            "layers": list(record.sites[file.site].layers),
            "width": record.sites[file.site].width,
            "samples_per_layer": {str(layer): counts.n_samples for layer in record.sites[file.site].layers},
            "first_sample_idx": counts.first_sample_idx,
            "last_sample_idx": counts.last_sample_idx,
            "total_tokens": counts.n_tokens,
            "dtype": record.dtype,
        }
        for record in records
        for counts, files in record.files_of_parts()
        for file in files
        if file.site is not None
    ]
    dropped: Counter[str] = Counter()
    for record in records:
        dropped.update(record.n_dropped)
    losses = total_losses((record.n_rows, record.losses) for record in records)
    return ({"losses": losses} if losses else {}) | {
        "total_shards": len(records),
        "total_activations": sum(r.n_samples * len(site.layers) for r in records for site in r.sites.values()),
        "total_unique_samples": sum(record.n_samples for record in records),
        "total_empty_samples": sum(record.n_empty for record in records),
        "total_tokens": sum(record.n_tokens for record in records),
        "total_dropped_tokens": dict(dropped),
        "total_bytes": sum(file.bytes for record in records for file in record.files),
        "shards": shards,
    }
