"""The local checkpoint: a cache for people. What is committed is decided by the records in the output folder alone."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from core.object_store import disk_errors


@dataclass(frozen=True)
class Checkpoint:
    """The state of one worker; `status` is "running", "stopped" or "complete"."""

    worker_id: int
    last_processed_sample_idx: int
    total_samples_processed: int
    total_shards: int
    dataset_path: str
    model_path: str
    status: str


def checkpoint_path(directory: str, worker_id: int) -> Path:
    """Where a worker's checkpoint lies."""
    return Path(directory) / f"checkpoint_worker_{worker_id}.json"


def save_checkpoint(directory: str, checkpoint: Checkpoint) -> None:
    """Replaces the worker's checkpoint in one step; raises RunError when the folder cannot be written."""
    path = checkpoint_path(directory, checkpoint.worker_id)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(checkpoint), indent=1) + "\n")
        temporary.replace(path)
