"""Named byte objects that are created once and never changed, on a local disk or in a bucket.

Everything that a run commits goes through `create_bytes` and `create_file`: of any number of writers of a name exactly
one creates it, no reader ever sees a partial object, and a later writer learns whether the existing object equals its
own. Only derived files (such as metadata.json, which can be rebuilt) may be replaced.

Stores may be shared by threads. A `gs://` store makes one connection per process and is not fork-safe: start children
with the spawn method, and open the store in the child (or send the store, which is pickled as its URL).
"""

from __future__ import annotations

from core.object_store.base import (
    Created,
    Entry,
    Listing,
    ObjectInfo,
    ObjectStore,
    RetryPolicy,
    bytes_info,
    file_info,
)
from core.object_store.local import LocalStore, disk_errors, sync_folder

__all__ = [
    "Created",
    "Entry",
    "Listing",
    "LocalStore",
    "ObjectInfo",
    "ObjectStore",
    "RetryPolicy",
    "bytes_info",
    "disk_errors",
    "file_info",
    "open_store",
    "sync_folder",
]


def open_store(url: str, retry: RetryPolicy | None = None) -> ObjectStore:
    """The store at a plain path, a `file://`, `gs://` or any other fsspec URL.

    Raises UsageError for a URL that cannot be used, RunError if there are no credentials for a bucket.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return LocalStore(url)
    if scheme in ("file", "local"):
        return LocalStore(rest)
    if scheme in ("gs", "gcs"):
        from core.object_store.gcs import GcsStore

        return GcsStore(url, retry or RetryPolicy())
    from core.object_store.generic import FsspecStore

    return FsspecStore(url)
