"""The output folder: shards, commit records and metadata, written so that no crash can lose or repeat a sample.

    <out>/run.json                    the identity of the run; create-only
    <out>/tpu_0/stream.json           which samples this folder holds; create-only
    <out>/tpu_0/shard_0001.pkl.gz     a window's activations; create-only (several sites: tpu_0/<site>/shard_0001.…)
    <out>/tpu_0/samples_0001.jsonl.gz its sample table: token ids, lengths, previews, labels; create-only
    <out>/tpu_0/shard_0001.json       the commit record, written after the files it names; create-only
    <out>/tpu_0/metadata.json         totals and shards, derived from the records; may be rebuilt at any time
    <out>/dataset.json                for a sharded dataset: its shards, each with a folder shard_000 …; create-only

Where several hosts share each window, every part of it has its own files, shard_0001_part_0.pkl.gz and so on, and
the record names those of all parts.

A window is committed when its record exists, and readers use only files that a record names. Every byte follows from
identity, stream and window, so a second writer of a name writes the same content, or keeps the first one's.
"""

import threading
from typing import Any

from absl import logging

from core.base.canonical_json import content_hash, sealed_json
from core.base.errors import RunError
from core.base.fault_points import fault_point
from core.commit.identity import RunIdentity, StreamIdentity
from core.commit.output_identity import RUN_FILE, STREAM_FILE, check_identity, write_identity
from core.commit.record import CommitRecord, StoredFile
from core.commit.stored_records import METADATA_FILE, committed_records, folder_metadata
from core.object_store import Created, LocalStore, ObjectInfo, ObjectStore
from core.object_store.sinks import digest_stream
from core.shards.encoding import SpooledFile
from core.shards.names import shard_stem


class ActivationStorage:
    """One worker's folder in the output.

    Args:
      identity, stream: of the run, and of the samples in this folder.
      folder: the worker's folder, such as `tpu_0`.
      primary: where a record commits a window.
      mirror: a local copy of a remote primary, or None.
      spool: where files are written before they are stored.
      extra_metadata: further fields of metadata.json.
    """

    def __init__(
        self,
        identity: RunIdentity,
        stream: StreamIdentity,
        folder: str,
        *,
        primary: ObjectStore,
        spool: LocalStore,
        mirror: ObjectStore | None = None,
        extra_metadata: dict[str, Any] | None = None,
    ) -> None:
        self.plan_hash = content_hash(identity.to_json())
        self.stream_hash = content_hash(stream.to_json())
        self.folder = folder
        self.spool = spool
        self._identity = identity
        self._stream = stream
        self._primary = primary
        self._mirror = mirror
        self._extra_metadata = extra_metadata or {}
        self._records: list[CommitRecord] = []
        self._lock = threading.Lock()
        self._claimed = False

    @property
    def committed_bytes(self) -> int:
        """Bytes of the files that the records name."""
        return sum(file.bytes for record in self._records for file in record.files)

    @property
    def committed_samples(self) -> int:
        """Samples of all committed windows."""
        return sum(record.n_samples for record in self._records)

    @property
    def last_record(self) -> CommitRecord | None:
        """The record of the last committed window."""
        return self._records[-1] if self._records else None

    @property
    def committed_shards(self) -> int:
        """Committed windows."""
        return len(self._records)

    @property
    def url(self) -> str:
        """The path or URL of the worker's folder."""
        return f"{self._primary.url}/{self.folder}"

    def open(self, n_windows: int | None = None) -> list[CommitRecord]:
        """The records in the folder, in window order; nothing is written before the first `store`.

        n_windows: how many windows host 0 has found; later ones are ignored.
        Raises UsageError when the folder belongs to another run or stream, RunError when it has fewer windows.
        """
        for store in self._stores():
            for name, wanted in self._identities():
                check_identity(store, name, wanted)
        self._records = committed_records(self._primary, self.folder)
        for record in self._records:
            if (record.plan_hash, record.stream_hash) != (self.plan_hash, self.stream_hash):
                raise RunError(f"{self.url}/{shard_stem(record.window)}.json was written by another run: verify it")
        if n_windows is not None and len(self._records) < n_windows:
            raise RunError(
                f"{self.url} has {len(self._records)} committed windows here, {n_windows} on host 0: "
                "all hosts need the same --output_dir, on a shared disk or gs://"
            ) from OSError("the hosts see different folders")
        self._records = self._records[:n_windows]
        return list(self._records)

    def _identities(self) -> list[tuple[str, dict[str, Any]]]:
        return [(RUN_FILE, self._identity.to_json()), (f"{self.folder}/{STREAM_FILE}", self._stream.to_json())]

    def _claim(self) -> None:
        """Writes the identity files, once; raises UsageError when another run did so first."""
        with self._lock:
            if self._claimed:
                return
            for store in self._stores():
                for name, wanted in self._identities():
                    write_identity(store, name, wanted)
            self._complete_mirror()
            self._claimed = True

    def _complete_mirror(self) -> None:
        """Writes the local records that are missing after a crash right after a remote commit; their files exist."""
        if self._mirror is None:
            return
        present = set(self._mirror.list(f"{self.folder}/"))
        for record in self._records:
            if self._record_name(record.window) not in present:
                self._mirror_record(record)

    def _mirror_record(self, record: CommitRecord) -> None:
        """Commits a window in the local copy, too, when the files there match the record."""
        if self._mirror is None:
            return
        found = (self._mirror.info(f"{self.folder}/{file.name}") for file in record.files)
        fault_point("mirror.before")
        if list(found) == [ObjectInfo(file.bytes, file.crc32c) for file in record.files]:
            self._mirror.create_bytes(self._record_name(record.window), record.to_bytes())
            fault_point("mirror.after")
        else:
            logging.warning(
                "window %d: the local files differ from those in the bucket: not committed locally", record.window
            )

    def _record_name(self, window: int) -> str:
        return f"{self.folder}/{shard_stem(window)}.json"

    def store(self, window: int, file: SpooledFile) -> StoredFile:
        """Stores one finished file under its name, and returns the file that is there afterwards.

        A different file may exist there without a commit record: a worker on other hardware, whose rounding differs,
        died before it could commit. When it has the same samples it is kept, and the record names it; otherwise
        RunError is raised.
        """
        self._claim()
        name = f"{self.folder}/{file.name}"
        fault_point("store.before")
        info = ObjectInfo(file.digest.bytes, file.digest.crc32c)
        mine = StoredFile(file.name, file.site, file.digest.bytes, file.digest.crc32c, file.digest.sha256)
        recorded = self._recorded_file(window, file.name)
        if recorded is not None and recorded != mine and self._primary.info(name) is None:
            raise RunError(
                f"{self._primary.url}/{name} was lost, and the bytes computed on this machine differ from those in "
                f"{shard_stem(window)}.json: remove that record and the files it names, then run again"
            )
        if self._primary.create_file(name, file.path, info) is Created.ALREADY_DIFFERENT:
            return self._existing_file(window, file)
        fault_point("store.after")
        if self._mirror is not None:
            self._mirror.create_file(name, file.path, info)
        return mine

    def commit(self, record: CommitRecord) -> CommitRecord:
        """Writes the commit record. Returns the record that is stored: this one, or another worker's earlier one."""
        name = self._record_name(record.window)
        data = record.to_bytes()
        stored = CommitRecord.from_bytes(data)  # an unreadable record must not be written: nothing would replace it
        fault_point("commit.before")
        if self._primary.create_bytes(name, data) is Created.ALREADY_DIFFERENT:
            stored = CommitRecord.from_bytes(self._primary.read_bytes(name))
        fault_point("commit.after")
        if stored.next_place != record.next_place:
            raise RunError(f"{self.url}: window {record.window} was committed with other samples: verify the folder")
        self._mirror_record(stored)
        self._records.append(stored)
        return stored

    def add_record(self, record: CommitRecord) -> CommitRecord:
        """Adds a record that another host has committed."""
        self._records.append(record)
        return record

    def commit_empty(self) -> None:
        """Commits a folder without samples: a short stream has no line for this machine."""
        self._claim()
        self.commit(CommitRecord.empty(self.plan_hash, self.stream_hash, self._identity.dtype))

    def write_metadata(self) -> None:
        """Rebuilds metadata.json from the records."""
        data = sealed_json(folder_metadata(self._records) | self._extra_metadata)
        fault_point("index.before")
        for store in self._stores():
            store.replace_bytes(f"{self.folder}/{METADATA_FILE}", data)
        fault_point("index.after")

    def _stores(self) -> list[ObjectStore]:
        return [self._primary, *([self._mirror] if self._mirror is not None else [])]

    def _existing_file(self, window: int, file: SpooledFile) -> StoredFile:
        """The different file that exists under a name: as its record lists it, else from its bytes."""
        return self._recorded_file(window, file.name) or self._adopt(file)

    def _recorded_file(self, window: int, name: str) -> StoredFile | None:
        """The file as the window's record lists it; None when there is no record, or it does not list the file."""
        try:
            record = CommitRecord.from_bytes(self._primary.read_bytes(self._record_name(window)))
        except FileNotFoundError:
            return None
        return next((stored for stored in record.files if stored.name == name), None)

    def _adopt(self, file: SpooledFile) -> StoredFile:
        name = f"{self.folder}/{file.name}"
        with self._primary.open(name) as stream:
            is_equivalent = file.is_equivalent is not None and file.is_equivalent(stream)
        if not is_equivalent:
            raise RunError(
                f"{self._primary.url}/{name} exists without a commit record and does not contain this window: "
                "remove it, or use another --output_dir"
            )
        with self._primary.open(name) as stream:
            digest = digest_stream(stream)
        return StoredFile(file.name, file.site, digest.bytes, digest.crc32c, digest.sha256)
