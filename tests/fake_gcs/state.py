"""What the fake bucket service holds, and the rules by which it changes. No HTTP here.

Every public method of `GcsState` is atomic: one lock, taken for the whole of a precondition check and its write. A
chunk of a resumable upload holds the lock of its session, and that one only for what it changes for others.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

import google_crc32c

CHUNK_GRANULE = 256 * 1024
MAX_PAGE = 1000
Query = Mapping[str, str]


class ApiError(Exception):
    """An answer other than success, with the reason string of the JSON API."""

    def __init__(self, code: int, reason: str, message: str, location: str | None = None) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.location = code, reason, message, location

    def body(self) -> dict[str, Any]:
        """The error document."""
        detail = {"message": self.message, "domain": "global", "reason": self.reason}
        if self.location:
            detail |= {"locationType": "header", "location": self.location}
        return {"error": {"code": self.code, "message": self.message, "errors": [detail]}}


def not_found(bucket: str, name: str) -> ApiError:
    """The 404 of an object."""
    return ApiError(404, "notFound", f"No such object: {bucket}/{name}")


def condition_not_met(location: str = "If-Match") -> ApiError:
    """The 412 of a precondition."""
    return ApiError(412, "conditionNotMet", "At least one of the pre-conditions you specified did not hold.", location)


def invalid(message: str) -> ApiError:
    """The 400 of a request that makes no sense."""
    return ApiError(400, "invalid", message)


def crc32c_base64(data: bytes) -> str:
    """CRC32C as the API writes it: base64 of the big-endian value."""
    return base64.b64encode(struct.pack(">I", google_crc32c.value(data))).decode()


def md5_base64(data: bytes) -> str:
    """MD5 as the API writes it."""
    return base64.b64encode(hashlib.md5(data).digest()).decode()


@dataclass(frozen=True)
class Hashes:
    """The checksums of an object, as the API writes them; what was composed of others has no MD5."""

    crc32c: str
    md5: str | None

    @classmethod
    def of(cls, data: bytes) -> Hashes:
        """Computed before the lock is taken, so that large uploads do not wait for each other."""
        return cls(crc32c_base64(data), md5_base64(data))


SETTABLE = ("contentType", "contentEncoding", "contentLanguage", "contentDisposition", "cacheControl", "customTime")


@dataclass(frozen=True)
class StoredObject:
    """A live object. The checksums are those of the bytes that were stored, not recomputed."""

    bucket: str
    name: str
    data: bytes
    generation: int
    crc32c: str
    md5: str | None
    settings: dict[str, str]
    metadata: dict[str, str]
    created: str
    updated: str
    metageneration: int = 1
    components: int | None = None

    def resource(self, base_url: str) -> dict[str, Any]:
        """The object resource (kind storage#object)."""
        quoted = quote(self.name, safe="")
        out: dict[str, Any] = {
            "kind": "storage#object",
            "id": f"{self.bucket}/{self.name}/{self.generation}",
            "selfLink": f"{base_url}/storage/v1/b/{self.bucket}/o/{quoted}",
            "mediaLink": f"{base_url}/download/storage/v1/b/{self.bucket}/o/{quoted}"
            f"?generation={self.generation}&alt=media",
            "name": self.name,
            "bucket": self.bucket,
            "generation": str(self.generation),
            "metageneration": str(self.metageneration),
            "storageClass": "STANDARD",
            "size": str(len(self.data)),
            "crc32c": self.crc32c,
            "etag": self.etag,
            "timeCreated": self.created,
            "updated": self.updated,
            "timeStorageClassUpdated": self.created,
            **self.settings,
        }
        if self.md5 is not None:
            out["md5Hash"] = self.md5
        if self.metadata:
            out["metadata"] = dict(self.metadata)
        if self.components is not None:
            out["componentCount"] = self.components
        return out

    @property
    def etag(self) -> str:
        """Changes with the generation and the metageneration."""
        return base64.b64encode(struct.pack(">QI", self.generation, self.metageneration)).decode()

    @property
    def hash_header(self) -> str:
        """x-goog-hash."""
        return f"crc32c={self.crc32c}" + (f",md5={self.md5}" if self.md5 else "")


@dataclass
class Upload:
    """A resumable upload session; the object appears only when its last byte is in."""

    bucket: str
    name: str
    resource: dict[str, Any]
    query: dict[str, str]
    data: bytearray = field(default_factory=bytearray)
    finished: StoredObject | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class GcsState:
    """All buckets, objects and upload sessions, and the history of every generation ever created."""

    buckets: dict[str, dict[str, StoredObject]] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    history: list[tuple[str, str, int]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    _last_generation: int = 0

    def create_bucket(self, bucket: str) -> dict[str, Any]:
        """409 if it exists."""
        with self.lock:
            if bucket in self.buckets:
                message = "Your previous request to create the named bucket succeeded and you already own it."
                raise ApiError(409, "conflict", message)
            self.buckets[bucket] = {}
            return self.bucket_resource(bucket)

    def bucket_resource(self, bucket: str) -> dict[str, Any]:
        """The bucket resource (kind storage#bucket); 404 if there is none."""
        self._objects(bucket)
        return {
            "kind": "storage#bucket",
            "id": bucket,
            "name": bucket,
            "projectNumber": "0",
            "metageneration": "1",
            "location": "US",
            "locationType": "multi-region",
            "storageClass": "STANDARD",
            "etag": "CAE=",
        }

    def delete_bucket(self, bucket: str) -> None:
        """409 if anything is in it."""
        with self.lock:
            if self._objects(bucket):
                raise ApiError(409, "conflict", "The bucket you tried to delete is not empty.")
            del self.buckets[bucket]

    def get(self, bucket: str, name: str, query: Query) -> StoredObject:
        """The live object if the preconditions in `query` hold; 404, 412, or 304 for the Not kinds."""
        with self.lock:
            return self._existing(bucket, name, query, reading=True)

    def insert(self, bucket: str, resource: Mapping[str, Any], data: bytes, query: Query) -> StoredObject:
        """Store an object: preconditions, then declared checksums, then a new generation."""
        name = resource.get("name") or query.get("name")
        if not name:
            raise ApiError(400, "required", "Required parameter: name")
        hashes = Hashes.of(data)
        with self.lock:
            objects = self._objects(bucket)
            check_preconditions(objects.get(name), query)
            _check_declared_hashes(resource, hashes)
            return self._put(bucket, name, data, hashes, resource)

    def delete(self, bucket: str, name: str, query: Query) -> None:
        """404 if absent, 412 by the preconditions."""
        with self.lock:
            found = self._existing(bucket, name, query)
            del self.buckets[bucket][found.name]

    def patch(self, bucket: str, name: str, changes: Mapping[str, Any], query: Query) -> StoredObject:
        """Merge metadata and settings (null deletes); the metageneration grows, the generation stays."""
        with self.lock:
            found = self._existing(bucket, name, query)
            metadata, settings = dict(found.metadata), dict(found.settings)
            _merge(metadata, changes.get("metadata") or {})
            _merge(settings, {key: changes[key] for key in SETTABLE if key in changes})
            new = replace(
                found,
                metadata=metadata,
                settings=settings,
                metageneration=found.metageneration + 1,
                updated=_now(),
            )
            self.buckets[bucket][name] = new
            return new

    def copy(
        self, source: tuple[str, str], target: tuple[str, str], resource: Mapping[str, Any], query: Query
    ) -> StoredObject:
        """rewriteTo and copyTo: source preconditions carry the prefix ifSource."""
        with self.lock:
            sources = {"generation": query.get("sourceGeneration")} | {
                "if" + key.removeprefix("ifSource"): value for key, value in query.items() if key.startswith("ifSource")
            }
            found = self._existing(*source, {key: value for key, value in sources.items() if value is not None})
            objects = self._objects(target[0])
            check_preconditions(objects.get(target[1]), query)
            fields = {**found.settings, "metadata": found.metadata, **resource}
            hashes = Hashes(found.crc32c, found.md5)
            return self._put(*target, found.data, hashes, fields, components=found.components)

    def move(self, bucket: str, name: str, target: str, query: Query) -> StoredObject:
        """moveTo: a rename inside a bucket."""
        with self.lock:
            new = self.copy((bucket, name), (bucket, target), {}, query)
            del self.buckets[bucket][name]
            return new

    def compose(self, bucket: str, name: str, request: Mapping[str, Any], query: Query) -> StoredObject:
        """Concatenate up to 32 objects; the result has a component count and no MD5."""
        parts = request.get("sourceObjects") or []
        if not 1 <= len(parts) <= 32:
            raise invalid("The number of source components provided must be between 1 and 32.")
        with self.lock:
            sources = []
            for part in parts:
                wanted = {key: str(value) for key, value in (part.get("objectPreconditions") or {}).items()}
                if "generation" in part:
                    wanted["generation"] = str(part["generation"])
                sources.append(self._existing(bucket, part["name"], wanted))
            check_preconditions(self.buckets[bucket].get(name), query)
            data = b"".join(source.data for source in sources)
            components = sum(source.components or 1 for source in sources)
            hashes = Hashes(crc32c_base64(data), None)
            return self._put(bucket, name, data, hashes, request.get("destination") or {}, components=components)

    def list_objects(self, bucket: str, query: Query, base_url: str) -> dict[str, Any]:
        """One page: items and prefixes in name order, both counted against maxResults."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = _decode_token(query.get("pageToken", ""))
        limit = min(int(query.get("maxResults", MAX_PAGE)), MAX_PAGE)
        items: list[StoredObject] = []
        prefixes: list[str] = []
        with self.lock:
            objects = self._objects(bucket)
            for name in sorted(objects, key=str.encode):
                if not name.startswith(prefix) or not _inside(name, query):
                    continue
                cut = name.find(delimiter, len(prefix)) if delimiter else -1
                entry = name if cut < 0 else name[: cut + len(delimiter)]
                if entry.encode() <= after or entry in prefixes[-1:]:
                    continue
                if len(items) + len(prefixes) == limit:
                    last = max([item.name for item in items[-1:]] + prefixes[-1:], key=str.encode)
                    return _page(items, prefixes, base_url, last)
                if cut < 0:
                    items.append(objects[name])
                else:
                    prefixes.append(entry)
        return _page(items, prefixes, base_url, None)

    def start_upload(self, bucket: str, resource: dict[str, Any], query: Query) -> str:
        """Open a session; a precondition that already fails is refused here, and checked again at the end."""
        name = resource.get("name") or query.get("name")
        if not name:
            raise ApiError(400, "required", "Required parameter: name")
        with self.lock:
            check_preconditions(self._objects(bucket).get(name), query)
            upload_id = secrets.token_urlsafe(24)
            self.uploads[upload_id] = Upload(bucket, name, {**resource, "name": name}, dict(query))
            return upload_id

    def cancel_upload(self, upload_id: str) -> None:
        """404 if there is no such session, or it is complete."""
        with self.lock:
            if self._upload(upload_id).finished is not None:
                raise ApiError(404, "notFound", "Upload not found: it is complete.")
            del self.uploads[upload_id]

    def upload_chunk(self, upload_id: str, first: int | None, total: int | None, data: bytes) -> StoredObject | int:
        """Add a chunk that starts at `first` (None: a status query). The object when complete, else bytes persisted.

        Bytes already persisted are skipped, so that a chunk may be sent again; a complete upload answers every
        request with its object.
        """
        with self.lock:
            upload = self._upload(upload_id)
        with upload.lock:
            if upload.finished is not None:
                return upload.finished
            if first is not None:
                self._append(upload, first, data, total)
            if total is None or len(upload.data) < total:
                return len(upload.data)
            upload.finished = self.insert(upload.bucket, upload.resource, bytes(upload.data), upload.query)
            upload.data.clear()
            return upload.finished

    def _append(self, upload: Upload, first: int, data: bytes, total: int | None) -> None:
        persisted = len(upload.data)
        if first > persisted:
            raise invalid(f"Invalid request. The chunk starts at {first}; {persisted} bytes are persisted.")
        end = first + len(data)
        if total is None or end < total:
            end -= end % CHUNK_GRANULE
        upload.data += data[persisted - first : max(end - first, 0)]

    def _put(
        self,
        bucket: str,
        name: str,
        data: bytes,
        hashes: Hashes,
        resource: Mapping[str, Any],
        components: int | None = None,
    ) -> StoredObject:
        self._last_generation = generation = max(self._last_generation + 1, time.time_ns() // 1000)
        now = _now()
        settings = {key: resource[key] for key in SETTABLE if resource.get(key) is not None}
        new = StoredObject(
            bucket,
            name,
            data,
            generation,
            hashes.crc32c,
            hashes.md5,
            settings,
            {key: str(value) for key, value in (resource.get("metadata") or {}).items()},
            now,
            now,
            components=components,
        )
        self.buckets[bucket][name] = new
        self.history.append((bucket, name, generation))
        return new

    def _objects(self, bucket: str) -> dict[str, StoredObject]:
        if bucket not in self.buckets:
            raise ApiError(404, "notFound", "The specified bucket does not exist.")
        return self.buckets[bucket]

    def _existing(self, bucket: str, name: str, query: Query, reading: bool = False) -> StoredObject:
        found = self._objects(bucket).get(name)
        if found is None or query.get("generation") not in (None, str(found.generation)):
            raise not_found(bucket, name)
        check_preconditions(found, query, reading)
        return found

    def _upload(self, upload_id: str) -> Upload:
        if upload_id not in self.uploads:
            raise ApiError(404, "notFound", "Upload not found.")
        return self.uploads[upload_id]


def check_preconditions(found: StoredObject | None, query: Query, reading: bool = False) -> None:
    """The four if*Match parameters. Generation 0 stands for "no live object"."""
    generation = found.generation if found else 0
    metageneration = found.metageneration if found else 0
    for key, actual in (("ifGenerationMatch", generation), ("ifMetagenerationMatch", metageneration)):
        if key in query and int(query[key]) != actual:
            raise condition_not_met()
    for key, actual in (("ifGenerationNotMatch", generation), ("ifMetagenerationNotMatch", metageneration)):
        if key in query and int(query[key]) == actual:
            raise ApiError(304, "notModified", "Not Modified") if reading else condition_not_met("If-None-Match")


def _check_declared_hashes(resource: Mapping[str, Any], hashes: Hashes) -> None:
    for key, label, actual in (("crc32c", "CRC32C", hashes.crc32c), ("md5Hash", "MD5 hash", hashes.md5)):
        declared = resource.get(key)
        if declared is not None and declared != actual:
            raise invalid(f'Provided {label} "{declared}" doesn\'t match calculated {label} "{actual}".')


def _merge(target: dict[str, str], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if value is None:
            target.pop(key, None)
        else:
            target[key] = str(value)


def _inside(name: str, query: Query) -> bool:
    start, end = query.get("startOffset", ""), query.get("endOffset")
    return name.encode() >= start.encode() and (not end or name.encode() < end.encode())


def _page(items: list[StoredObject], prefixes: list[str], base_url: str, last: str | None) -> dict[str, Any]:
    out: dict[str, Any] = {"kind": "storage#objects"}
    if last is not None:
        out["nextPageToken"] = base64.urlsafe_b64encode(last.encode()).decode()
    if prefixes:
        out["prefixes"] = prefixes
    if items:
        out["items"] = [item.resource(base_url) for item in items]
    return out


def _decode_token(token: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(token)
    except ValueError:
        raise invalid("Invalid argument: pageToken") from None


def _now() -> str:
    now = time.time_ns()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9)) + f".{now // 10**6 % 1000:03d}Z"
