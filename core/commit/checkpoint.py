"""The local checkpoint, for information only: the records in the output folder decide what is committed."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from core.base.fault_points import fault_point
from core.base.redaction import redact
from core.object_store import LocalStore


@dataclass(frozen=True)
class WorkerCheckpoint:
    """The state of one worker; `status` is "running", "stopped" or "complete"."""

    worker_id: int
    last_processed_sample_idx: int
    total_samples_processed: int
    total_shards: int
    dataset_path: str
    model_path: str
    status: str


def checkpoint_path(directory: str, worker_id: int) -> Path:
    """The path of a worker's checkpoint."""
    return Path(directory) / f"checkpoint_worker_{worker_id}.json"


def save_checkpoint(directory: str, checkpoint: WorkerCheckpoint) -> None:
    """Replaces the worker's checkpoint in one step; raises RunError when the folder cannot be written."""
    path = checkpoint_path(directory, checkpoint.worker_id)
    data = redact(json.dumps(asdict(checkpoint), indent=1) + "\n").encode()
    fault_point("checkpoint.before")
    LocalStore(path.parent).replace_bytes(path.name, data)
    fault_point("checkpoint.after")
