"""A small fake of the Google Cloud Storage JSON API on a loopback port, with scripted faults.

    with FakeGcs() as server:
        server.faults.add("object.get", Status(503), times=2)
        ...                      # a client with gcs_environment(server) in its environment
        assert server.objects("bucket") == {"a/b.json": b"{}"}

What it answers follows the public reference of the JSON API (objects, buckets, uploads, batch, error bodies).
Not modelled: authentication, access control, object versions (a replaced object is gone), life cycles, soft delete.
"""

from fake_gcs.faults import (
    Action,
    Call,
    CommitThenReset,
    CommitThenStatus,
    CorruptUpload,
    Faults,
    PersistPart,
    Reset,
    Stall,
    Status,
    TruncateBody,
)
from fake_gcs.server import FakeGcs, LoggedRequest, gcs_environment
from fake_gcs.state import ApiError, GcsState, StoredObject

__all__ = [
    "Action",
    "ApiError",
    "Call",
    "CommitThenReset",
    "CommitThenStatus",
    "CorruptUpload",
    "FakeGcs",
    "Faults",
    "GcsState",
    "LoggedRequest",
    "PersistPart",
    "Reset",
    "Stall",
    "Status",
    "StoredObject",
    "TruncateBody",
    "gcs_environment",
]
