"""The output folder: shard files, commit records and the index, written so that no crash can lose or repeat a sample.

    <out>/run.json                    the plan; create-only
    <out>/tpu_0/stream.json           which samples this folder holds; create-only
    <out>/tpu_0/shard_0001.pkl.gz     a window's activations; create-only (several sites: tpu_0/<site>/shard_0001.…)
    <out>/tpu_0/samples_0001.jsonl.gz its sample table: token ids, lengths, previews, labels; create-only
    <out>/tpu_0/shard_0001.json       the commit record, written after the files it names; create-only
    <out>/tpu_0/metadata.json         an index derived from the records; may be rebuilt at any time
    <out>/dataset.json                of a sharded dataset: its shards, each with a folder shard_000 …; create-only

Where several hosts share each window, every part of it has files of its own, shard_0001_part_0.pkl.gz and so on, and
the record names those of all parts.

A window is committed when its record exists, and readers believe only what a record names. Every byte follows from
plan, stream and window, so whoever writes a name a second time writes the same content or steps back.
"""

import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from absl import logging

from core.errors import RunError, UsageError
from core.fault_points import fault_point
from core.formats import ARRAY_DTYPES, CODE_DTYPES, DTYPES
from core.json_types import NONE, Kinds, require_all, require_types
from core.losses import Losses, is_losses, total_losses
from core.object_store import Created, LocalStore, ObjectInfo, ObjectStore
from core.plan import (
    RunPlan,
    StreamPlan,
    canonical_json,
    content_hash,
    differing_fields,
    read_sealed_json,
    sealed_json,
)
from core.sinks import FileDigest, digest_stream
from core.windows import StreamPlace

RECORD_NAME = re.compile(r"shard_([0-9]{4,})\.json")
# What a record names is read, and becomes a path.
_FILE_NAME = re.compile(r"(?:[a-z][a-z0-9_]*/)?(?:shard|samples)_([0-9]{4,})(?:_part_([0-9]{1,6}))?(?:\.[a-z0-9_]+)+")
RUN_FILE = "run.json"
STREAM_FILE = "stream.json"
DATASET_FILE = "dataset.json"
INDEX_FILE = "metadata.json"
_SHOWN_DIFFERENCES = 8
# Reading the records of a long run back is latency, not bandwidth.
_READ_THREADS = 16


@dataclass(frozen=True)
class StoredFile:
    """A file as its commit record names it; `name` is relative to the worker's folder, `site` None for the table."""

    name: str
    site: str | None
    bytes: int
    crc32c: str
    sha256: str

    @property
    def part(self) -> int:
        """The part of the window that it holds, from 0; windows of one part do not say so in their names."""
        named = _FILE_NAME.fullmatch(self.name)
        return int(named[2] or 0) if named is not None else 0


@dataclass(frozen=True)
class PartCounts:
    """What one part of a window holds; its first and last `sample_idx` are None where it holds no sample."""

    first_sample_idx: int | None
    last_sample_idx: int | None
    n_samples: int
    n_tokens: int


@dataclass(frozen=True)
class StoredPart:
    """A part of a window that is stored but not committed.

    number: of the part; None where a host had none to compute. n_dropped, n_empty: as in `CommitRecord`.
    """

    number: int | None
    counts: PartCounts
    n_dropped: dict[str, int]
    n_empty: int
    n_rows: int
    files: tuple[StoredFile, ...]
    losses: Losses

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "StoredPart":
        """From what `dataclasses.asdict` gave, by way of JSON."""
        files = tuple(StoredFile(**file) for file in fields["files"])
        return cls(**fields | {"files": files, "counts": PartCounts(**fields["counts"])})


@dataclass(frozen=True)
class StoredSite:
    """What the arrays of a site are: `layers` in their order, each of (rows, width).

    Attributes:
      arrays: where less than a row is stored, the arrays of the site by name, each with its width and dtype.
      block: how many of its values share a scale there; 0: all of them.
    """

    layers: tuple[int, ...]
    width: int
    arrays: dict[str, dict[str, Any]] = field(default_factory=dict)
    block: int | None = None


_FILE: Kinds = {"name": (str,), "site": (str, NONE), "bytes": (int,), "crc32c": (str,), "sha256": (str,)}
_PLACE: Kinds = {"position": (int,), "sample_idx": (int,)}
_SITE: Kinds = {"layers": (list,), "width": (int,)}
_PART: Kinds = {
    **dict.fromkeys(("first_sample_idx", "last_sample_idx"), (int, NONE)),
    **dict.fromkeys(("n_samples", "n_tokens"), (int,)),
}
_ARRAYS: Kinds = {"arrays": (dict,), "block": (int, NONE)}
_COUNTS = ("n_samples", "n_tokens", "n_truncated", "n_empty")
# Left out of the records of runs that have none.
_OF_SOME = {"parts", "pools", "losses", "arrays", "block"}
_RECORD: Kinds = {
    **dict.fromkeys(("window", "first_sample_idx", "last_sample_idx", "samples_per_record", *_COUNTS), (int,)),
    **dict.fromkeys(("plan_hash", "stream_hash", "dtype"), (str,)),
    "next_place": (dict, NONE),
    "n_dropped": (dict,),
    "sites": (dict,),
    "files": (list,),
    "bad_records": (list,),
}


@dataclass(frozen=True)
class CommitRecord:
    """What one committed window holds. It carries no time and no name of who wrote it: same window, same bytes.

    Attributes:
      next_place: where the next window begins; None when the stream ends with this one.
      n_tokens: stored; n_dropped: by reason, those that the model saw besides (`core.selection`).
      n_empty: samples of which no token is stored.
      pools: what is stored of a sample in the place of its tokens; empty: a row for each token.
      losses: what is lost where less than a row is stored, see `core.losses.Losses`.
      samples_per_record: each record of the stream makes so many samples, `sample_idx` = position ×
        samples_per_record + prediction.
      parts: what each part of the window holds; empty, and not stored, where the window is one part.
    """

    window: int
    plan_hash: str
    stream_hash: str
    first_sample_idx: int
    last_sample_idx: int
    next_place: StreamPlace | None
    n_samples: int
    n_tokens: int
    n_truncated: int
    n_dropped: dict[str, int]
    n_empty: int
    samples_per_record: int
    sites: dict[str, StoredSite]
    dtype: str
    files: tuple[StoredFile, ...]
    bad_records: tuple[dict[str, Any], ...] = field(default=())
    pools: tuple[str, ...] = ()
    losses: Losses = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        """Of each stored array."""
        return (self.n_samples - self.n_empty) * len(self.pools) if self.pools else self.n_tokens

    parts: tuple[PartCounts, ...] = field(default=())

    def files_of_parts(self) -> Iterator[tuple[PartCounts, list[StoredFile]]]:
        """The parts of the window in the order of their samples, each with its files, the sample table first."""
        whole = PartCounts(self.first_sample_idx, self.last_sample_idx, self.n_samples, self.n_tokens)
        for number, counts in enumerate(self.parts or [whole]):
            own = [file for file in self.files if file.part == number]
            yield counts, sorted(own, key=lambda file: file.site is not None)

    @property
    def n_seen(self) -> int:
        """Tokens that the model saw."""
        return self.n_tokens + sum(self.n_dropped.values())

    def to_bytes(self) -> bytes:
        """The record as stored, with its own checksum; what only some runs have is left out of others."""
        fields = asdict(self)
        for holder in (fields, *fields["sites"].values()):
            for name in _OF_SOME & holder.keys():
                if holder[name] in ((), {}, None):
                    del holder[name]
        return sealed_json(fields)

    @classmethod
    def from_bytes(cls, data: bytes) -> "CommitRecord":
        """Reads a stored record; raises ValueError when it was changed, or a field is missing or cannot be."""
        try:
            fields = read_sealed_json(data)
            _check_record(fields)
            if fields["next_place"] is not None:
                fields["next_place"] = StreamPlace(**fields["next_place"])
            fields["files"] = tuple(StoredFile(**file) for file in fields["files"])
            fields["sites"] = {
                name: StoredSite(**site | {"layers": tuple(site["layers"])}) for name, site in fields["sites"].items()
            }
            fields["bad_records"] = tuple(fields["bad_records"])
            fields["parts"] = tuple(PartCounts(**part) for part in fields.get("parts", ()))
            fields["pools"] = tuple(fields.get("pools", ()))
            return cls(**fields)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"not a commit record: {error}") from error


def _check_record(fields: Any) -> None:
    require_types(fields, _RECORD)
    if fields["next_place"] is not None:
        require_types(fields["next_place"], _PLACE, "next_place.")
    for file in fields["files"]:
        require_types(file, _FILE, "files.")
        named = _FILE_NAME.fullmatch(file["name"])
        if named is None or int(named[1]) != fields["window"]:
            raise ValueError(f"'files.name' is {file['name']!r}, which is no file of window {fields['window']}")
    for bad in fields["bad_records"]:
        require_types(bad, {"position": (int,)}, "bad_records.")
    for name, site in fields["sites"].items():
        require_types(site, _SITE, f"sites.{name}.")
        require_all(site["layers"], int, f"sites.{name}.layers")
        _check_arrays(site, name)
    require_all(fields.get("pools", []), str, "pools")
    if not is_losses(fields.get("losses", {})):
        raise ValueError("'losses' are not figures by site and layer")
    require_types(fields["n_dropped"], dict.fromkeys(fields["n_dropped"], (int,)), "n_dropped.")
    is_coded = any(site.get("arrays") for site in fields["sites"].values())
    dtypes = DTYPES | CODE_DTYPES if is_coded or not fields["sites"] else DTYPES
    negative = [name for name in _COUNTS if fields[name] < 0]
    if negative or fields["samples_per_record"] < 1 or fields["dtype"] not in dtypes:
        name = [*negative, "samples_per_record" if fields["samples_per_record"] < 1 else "dtype"][0]
        raise ValueError(f"{name!r} is {fields[name]!r}, which cannot be")
    if {file["site"] for file in fields["files"]} - {None} != fields["sites"].keys():
        raise ValueError("'sites' are not those of its files")
    if "parts" in fields:
        _check_parts(fields)


def _check_parts(fields: dict[str, Any]) -> None:
    require_all(fields["parts"], dict, "parts")
    for part in fields["parts"]:
        require_types(part, _PART, "parts.")
    for count in ("n_samples", "n_tokens"):
        if sum(part[count] for part in fields["parts"]) != fields[count]:
            raise ValueError(f"the 'parts' do not add up to {count!r}")
    sites = [None, *fields["sites"]]
    for number, part in enumerate(fields["parts"]):
        own = [file["site"] for file in fields["files"] if StoredFile(**file).part == number]
        if sorted(own, key=str) != (sorted(sites, key=str) if part["n_samples"] else []):
            raise ValueError(f"the files of part {number} are not one for each site and a sample table")
    if any(StoredFile(**file).part >= len(fields["parts"]) for file in fields["files"]):
        raise ValueError("a file is of none of the 'parts'")


def _check_arrays(site: dict[str, Any], name: str) -> None:
    arrays = site.get("arrays", {})
    require_types(site | {"arrays": arrays, "block": site.get("block")}, _ARRAYS, f"sites.{name}.")
    for array, described in arrays.items():
        require_types(described, {"width": (int,), "dtype": (str,)}, f"sites.{name}.arrays.{array}.")
        if described["dtype"] not in ARRAY_DTYPES:
            raise ValueError(f"'sites.{name}.arrays.{array}.dtype' is {described['dtype']!r}, which cannot be")


@dataclass(frozen=True)
class SpooledFile:
    """A finished file on the local disk, waiting to be stored under `name` in the worker's folder.

    `is_equivalent` tells whether another file's stream holds the same samples up to rounding; None when rounding cannot
    touch the content, so that any other file is a wrong one.
    """

    name: str
    site: str | None
    path: Path
    digest: FileDigest
    is_equivalent: Callable[[BinaryIO], bool] | None


def shard_stem(window: int) -> str:
    """`shard_0001` for window 1."""
    return f"shard_{window:04d}"


def table_name(window: int, part: int | None = None) -> str:
    """The name of the sample table of a window, or of a part of it."""
    return f"samples_{window:04d}{_of_part(part)}.jsonl.gz"


def site_file_name(window: int, site: str, sites: Sequence[str], suffix: str, part: int | None = None) -> str:
    """Where one site's file of a window lies in the worker's folder: in a folder of its own when there are several."""
    name = f"{shard_stem(window)}{_of_part(part)}{suffix}"
    return name if len(sites) == 1 else f"{site}/{name}"


def _of_part(part: int | None) -> str:
    return "" if part is None else f"_part_{part}"


class ActivationStorage:
    """One worker's folder in the output.

    Args:
      plan, stream: what the folder is for.
      folder: the worker's folder, such as `tpu_0`.
      primary: where a commit counts.
      mirror: a local copy kept beside a remote primary, or None.
      spool: where files are written before they are stored.
      index_extra: further fields of metadata.json.
    """

    def __init__(
        self,
        plan: RunPlan,
        stream: StreamPlan,
        folder: str,
        *,
        primary: ObjectStore,
        spool: LocalStore,
        mirror: ObjectStore | None = None,
        index_extra: dict[str, Any] | None = None,
    ) -> None:
        self.plan_hash = content_hash(plan.to_json())
        self.stream_hash = content_hash(stream.to_json())
        self.folder = folder
        self.spool = spool
        self._plan = plan
        self._stream = stream
        self._primary = primary
        self._mirror = mirror
        self._index_extra = index_extra or {}
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
        """Where the worker's folder is."""
        return f"{self._primary.url}/{self.folder}"

    def open(self, n_windows: int | None = None) -> list[CommitRecord]:
        """What is committed in the folder, in window order; nothing is written before the first `store`.

        n_windows: how many another host has found there: the rest is left out.
        Raises UsageError when the folder holds another plan or stream, RunError when it holds fewer windows.
        """
        for store in self._stores():
            for name, wanted in self._identities():
                refuse_other(store, name, wanted)
        self._records = committed_records(self._primary, self.folder)
        for record in self._records:
            if (record.plan_hash, record.stream_hash) != (self.plan_hash, self.stream_hash):
                raise RunError(f"{self.url}/{shard_stem(record.window)}.json was written for another plan: verify it")
        if n_windows is not None and len(self._records) < n_windows:
            raise RunError(
                f"{self.url} holds {len(self._records)} committed windows here, {n_windows} on host 0: "
                "the hosts need one --output_dir, on a shared disk or gs://"
            ) from OSError("the hosts see different folders")
        self._records = self._records[:n_windows]
        return list(self._records)

    def _identities(self) -> list[tuple[str, dict[str, Any]]]:
        return [(RUN_FILE, self._plan.to_json()), (f"{self.folder}/{STREAM_FILE}", self._stream.to_json())]

    def _claim(self) -> None:
        """Writes what the folder is for, once; raises UsageError when another run did so first."""
        with self._lock:
            if self._claimed:
                return
            for store in self._stores():
                for name, wanted in self._identities():
                    declare(store, name, wanted)
            self._complete_mirror()
            self._claimed = True

    def _complete_mirror(self) -> None:
        """Writes the local records that a crash right behind a remote commit left out; their files are there."""
        if self._mirror is None:
            return
        present = set(self._mirror.list(f"{self.folder}/"))
        for record in self._records:
            if self._record_name(record.window) not in present:
                self._mirror_record(record)

    def _mirror_record(self, record: CommitRecord) -> None:
        """Commits a window in the local copy too, when the files there are those that the record names."""
        if self._mirror is None:
            return
        held = (self._mirror.info(f"{self.folder}/{file.name}") for file in record.files)
        fault_point("mirror.before")
        if list(held) == [ObjectInfo(file.bytes, file.crc32c) for file in record.files]:
            self._mirror.create_bytes(self._record_name(record.window), record.to_bytes())
            fault_point("mirror.after")
        else:
            logging.warning("the local copy of window %d is not what the bucket holds: it is left out", record.window)

    def _record_name(self, window: int) -> str:
        return f"{self.folder}/{shard_stem(window)}.json"

    def store(self, window: int, file: SpooledFile) -> StoredFile:
        """Stores one finished file under its name, and returns what stands there now.

        Another file may already stand there without a commit record: a worker on other hardware, whose rounding
        differs, died before it could commit. When it holds the same samples it is kept, and the record names it;
        otherwise RunError is raised.
        """
        self._claim()
        name = f"{self.folder}/{file.name}"
        fault_point("store.before")
        info = ObjectInfo(file.digest.bytes, file.digest.crc32c)
        mine = StoredFile(file.name, file.site, file.digest.bytes, file.digest.crc32c, file.digest.sha256)
        named = self._named(window, file.name)
        if named is not None and named != mine and self._primary.info(name) is None:
            raise RunError(
                f"{self._primary.url}/{name} was lost, and this machine's rounding gives other bytes than "
                f"{shard_stem(window)}.json names: remove that record and the files it names, then run again"
            )
        if self._primary.create_file(name, file.path, info) is Created.ALREADY_DIFFERENT:
            return self._standing(window, file)
        fault_point("store.after")
        if self._mirror is not None:
            self._mirror.create_file(name, file.path, info)
        return mine

    def commit(self, record: CommitRecord) -> CommitRecord:
        """Writes the commit record, then the index. Returns the record that stands: mine, or an earlier one."""
        name = self._record_name(record.window)
        data = record.to_bytes()
        CommitRecord.from_bytes(data)  # what could not be read must not be written: nothing would replace it
        fault_point("commit.before")
        if self._primary.create_bytes(name, data) is Created.ALREADY_DIFFERENT:
            data = self._primary.read_bytes(name)
        fault_point("commit.after")
        standing = CommitRecord.from_bytes(data)
        if standing.next_place != record.next_place:
            raise RunError(f"{self.url}: window {record.window} was committed with other samples: verify the folder")
        self._mirror_record(standing)
        self._records.append(standing)
        return standing

    def believe(self, record: CommitRecord) -> CommitRecord:
        """Takes note of what another host has committed."""
        self._records.append(record)
        return record

    def commit_nothing(self) -> None:
        """Commits that the stream has no sample for this folder: its share of a short stream is empty."""
        self._claim()
        nothing: dict[str, Any] = dict.fromkeys((*_COUNTS, "first_sample_idx"), 0)
        self.commit(
            CommitRecord(
                window=1,
                plan_hash=self.plan_hash,
                stream_hash=self.stream_hash,
                last_sample_idx=-1,
                next_place=None,
                n_dropped={},
                samples_per_record=1,
                sites={},
                dtype=self._plan.dtype,
                files=(),
                **nothing,
            )
        )

    def write_index(self) -> None:
        """Rebuilds metadata.json from the records."""
        data = sealed_json(index_of(self._records) | self._index_extra)
        fault_point("index.before")
        for store in self._stores():
            store.replace_bytes(f"{self.folder}/{INDEX_FILE}", data)
        fault_point("index.after")

    def _stores(self) -> list[ObjectStore]:
        return [self._primary, *([self._mirror] if self._mirror is not None else [])]

    def _standing(self, window: int, file: SpooledFile) -> StoredFile:
        """What stands under a name whose content is not ours: as its record says, else as the bytes are."""
        return self._named(window, file.name) or self._adopt(file)

    def _named(self, window: int, name: str) -> StoredFile | None:
        """The file as the window's record names it; None when there is no record, or it does not."""
        try:
            record = CommitRecord.from_bytes(self._primary.read_bytes(self._record_name(window)))
        except FileNotFoundError:
            return None
        return next((stored for stored in record.files if stored.name == name), None)

    def _adopt(self, file: SpooledFile) -> StoredFile:
        name = f"{self.folder}/{file.name}"
        with self._primary.open(name) as stream:
            is_ours = file.is_equivalent is not None and file.is_equivalent(stream)
        if not is_ours:
            raise RunError(
                f"{self._primary.url}/{name} stands there without a commit record and does not hold this window: "
                "remove it, or use another --output_dir"
            )
        with self._primary.open(name) as stream:
            digest = digest_stream(stream)
        return StoredFile(file.name, file.site, digest.bytes, digest.crc32c, digest.sha256)


def refuse_other(store: ObjectStore, name: str, wanted: dict[str, Any]) -> None:
    """Raises UsageError naming the fields that differ when `name` exists and says something else than `wanted`."""
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
        # Jobs of different numbers of hosts began at once: whoever starts again takes over what stands.
        raise RunError(f"{store.url}/{name}: another job has just begun this output ({differences[0]}): start again")
    if differences:
        more = f"; {len(differences) - _SHOWN_DIFFERENCES} more" * (len(differences) > _SHOWN_DIFFERENCES)
        other_worker = " another --worker_id," * name.endswith(STREAM_FILE)
        raise UsageError(
            f"{store.url}/{name} holds another run ({'; '.join(differences[:_SHOWN_DIFFERENCES])}{more}): "
            f"use the same flags,{other_worker} or another --output_dir"
        )


def declare(store: ObjectStore, name: str, wanted: dict[str, Any]) -> None:
    """Writes what an output is for, create-only; raises UsageError when it says something else already."""
    fault_point("declare.before")
    if store.create_bytes(name, canonical_json(wanted)) is Created.ALREADY_DIFFERENT:
        refuse_other(store, name, wanted)
    fault_point("declare.after")


def committed_records(store: ObjectStore, folder: str) -> list[CommitRecord]:
    """The records of a folder up to the first that is missing, or one of whose files is.

    That is what a run may build on: windows behind a gap are extracted again, and meet the files that still stand.
    """
    names = set(store.list(f"{folder}/"))
    by_window = _record_names(names, folder)
    whole = list(itertools.takewhile(lambda window: window in by_window, itertools.count(1)))
    records = _read_all(store, by_window, whole)
    complete = itertools.takewhile(lambda r: all(f"{folder}/{file.name}" in names for file in r.files), records)
    kept = list(complete)
    if len(kept) < len(by_window):
        logging.warning("%s/%s: window %d is damaged: going on from there", store.url, folder, len(kept) + 1)
    return kept


def has_index_of(store: ObjectStore, folder: str, records: Sequence[CommitRecord]) -> bool:
    """Whether a folder's index is whole, and that of these records."""
    try:
        index = read_sealed_json(store.read_bytes(f"{folder}/{INDEX_FILE}"))
    except (FileNotFoundError, ValueError):
        return False
    return index.items() >= index_of(records).items()


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


def index_of(records: Sequence[CommitRecord]) -> dict[str, Any]:
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
