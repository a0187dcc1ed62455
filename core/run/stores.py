"""The stores that a run writes to, from its flags, and the folder of a job in them."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from core.activation_storage import ActivationStorage
from core.base.errors import UsageError
from core.hosts.pod_slice import Hosts
from core.object_store import LocalStore, ObjectStore, disk_errors, open_store
from core.run.config import RunConfig
from core.run.job import Job


@dataclass(frozen=True)
class Stores:
    """The stores that a run writes to.

    Attributes:
      primary: where a record commits a window.
      spool: where files are written before they are stored.
      mirror: a local copy of a remote primary, or None.
    """

    primary: ObjectStore
    spool: LocalStore
    mirror: ObjectStore | None

    def all(self) -> list[ObjectStore]:
        """The stores that hold the output."""
        return [self.primary, *([self.mirror] if self.mirror is not None else [])]


def open_stores(config: RunConfig, parts: int = 1) -> Stores:
    """The stores of the output; nothing is written yet. parts: of each window, see `RunIdentity`.

    Local output: written in place. Remote output: files are finished in a folder below TMPDIR, then uploaded. Local
    output with upload: windows are committed in the bucket; the local folder is a copy unless it is deleted.
    """
    spool = LocalStore(_scratch_folder() if config.output_is_remote else config.local_output)
    primary: ObjectStore = spool
    if config.output_is_remote:
        primary = open_store(config.output_dir)
    elif config.uploads:
        primary = open_store(config.gcs_url)
    # A host that shares windows with others has its own parts alone on its disk, which is no output.
    keeps_copy = config.uploads and not config.delete_local_after_upload and parts == 1
    return Stores(primary, spool, spool if keeps_copy else None)


def require_shared_output(config: RunConfig, hosts: Hosts) -> None:
    """Raises UsageError on a host whose local output folder is not the one that host 0 writes to."""
    if hosts.count == 1 or config.output_is_remote or config.uploads:
        return
    store = LocalStore(config.local_output)
    probe: Path | None = None

    def write() -> str:
        nonlocal probe
        probe = store.temporary_path("probe")
        with disk_errors(probe):
            probe.touch()
        return probe.name

    try:
        name = hosts.broadcast("probe", write)
        if not (store.root / name).exists():
            raise UsageError(
                f"--output_dir {config.output_dir}: host {hosts.host_id} does not see the files of host 0 there: "
                "pass a folder on a shared disk, a gs:// URL, or --upload_to_gcs"
            )
        hosts.publish(f"saw_probe/{hosts.host_id}", True)
        for host in range(1, hosts.count) if hosts.is_first else ():
            hosts.wait_for(f"saw_probe/{host}")
    finally:
        if probe is not None:
            probe.unlink(missing_ok=True)


def open_storage(job: Job, stores: Stores | None = None) -> ActivationStorage:
    """The job's folder in the output; nothing is written yet."""
    config = job.config
    stores = stores or open_stores(config, job.identity.parts)
    return ActivationStorage(
        job.identity,
        job.stream,
        job.folder,
        primary=stores.primary,
        spool=stores.spool,
        mirror=stores.mirror,
        extra_metadata={
            "shard_size_gb": config.shard_size_gb,
            "gcs_bucket": config.gcs_bucket if config.uploads else None,
            "gcs_prefix": config.gcs_prefix if config.uploads else None,
        },
    )


def _scratch_folder() -> Path:
    """Shared by all runs of a user, so that the next run finds and removes what a killed run left."""
    return Path(tempfile.gettempdir()) / f"extract_activations_{os.getuid()}"
