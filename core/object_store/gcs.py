"""Objects of a Google Cloud Storage bucket."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import io
import itertools
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote

from core.base.byte_streams import SeekableBytes
from core.base.endpoints import emulator_url
from core.base.errors import ModelError, RunError, UsageError
from core.base.fault_points import fault_point
from core.base.redaction import redact
from core.object_store.base import (
    Created,
    Entry,
    Listing,
    ObjectInfo,
    RetryPolicy,
    bytes_info,
    check_name,
    check_size,
)

UPLOAD_CHUNK = 8 << 20  # a multiple of 256 KiB, as resumable uploads demand
SIGN_IN = "run `gcloud auth application-default login`, or give the machine's service account access to the bucket"
_WRITER = "writer"


class _UploadLostError(Exception):
    """A resumable upload expired, is stuck or is damaged: start it again."""


class GcsStore:
    """A folder of a bucket, through gcsfs's plain JSON API, whose preconditions make creation exclusive.

    The custom metadata of every object has a nonce of the call that wrote it. When the reply to a create-only upload
    is lost, the retry fails with "exists"; the nonce then distinguishes our own object from another writer's.
    """

    def __init__(self, url: str, retry: RetryPolicy) -> None:
        _, _, path = url.rstrip("/").partition("://")
        self.bucket, _, self.prefix = path.partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", self.bucket):
            raise UsageError(f"{url}: {self.bucket!r} is not a bucket name; write gs://BUCKET/FOLDER")
        if self.prefix:
            check_name(self.prefix)
        self.url = f"gs://{path}"
        self.retry = retry
        self._owner = os.getpid()
        self._connection = _connect(retry)

    def __reduce__(self) -> tuple[Any, ...]:
        return GcsStore, (self.url, self.retry)

    def create_bytes(self, name: str, data: bytes) -> Created:
        """See `ObjectStore`. The server checks the checksum before it commits."""
        created = self._create(name, io.BytesIO(data), bytes_info(data))
        if created is Created.ALREADY_SAME and self.read_bytes(name) != data:
            return Created.ALREADY_DIFFERENT
        return created

    def create_file(self, name: str, local_path: Path, info: ObjectInfo) -> Created:
        """See `ObjectStore`. The server checks the checksum before it commits; the local file stays."""
        check_size(local_path, info)
        with open(local_path, "rb") as file:
            return self._create(name, file, info)

    def replace_bytes(self, name: str, data: bytes) -> None:
        """See `ObjectStore`."""
        self._upload(name, io.BytesIO(data), bytes_info(data), uuid.uuid4().hex, {})

    def read_bytes(self, name: str) -> bytes:
        """See `ObjectStore`. One request, meant for records; read shards through `open`."""
        with self._errors("read", name):
            for _ in range(self.retry.tries):
                headers, data = self._media(name, {})
                if _matches_hash(headers.getall("x-goog-hash", []), data):
                    return data
        raise RunError(f"cannot read {self.url}/{name}: its bytes do not match its checksum; the object is damaged")

    def open(self, name: str) -> BinaryIO:
        """See `ObjectStore`. Reads ranges of the current generation; it is an error if the object is replaced."""
        found = self._stat(name)
        if found is None:
            raise FileNotFoundError(f"{self.url}/{name}")
        fetch = functools.partial(self._read_range, name, found["generation"])
        stream = SeekableBytes(lambda start, stop: fetch(start, stop - 1), int(found["size"]))
        return cast(BinaryIO, io.BufferedReader(stream, UPLOAD_CHUNK))

    def info(self, name: str) -> ObjectInfo | None:
        """See `ObjectStore`."""
        found = self._stat(name)
        return None if found is None else _metadata_info(found)

    def list(self, prefix: str = "") -> list[str]:
        """See `ObjectStore`."""
        return [entry.name for entry in self.listing(prefix).entries]

    def listing(self, prefix: str = "") -> Listing:
        """See `ObjectStore`."""
        root = f"{self.prefix}/" if self.prefix else ""
        fields = "items(name,size,updated,generation),nextPageToken"
        query = {"prefix": root + prefix, "fields": fields, "maxResults": "1000"}
        items: list[dict[str, str]] = []
        while True:
            headers, page = self._page(query)
            items += page.get("items", [])
            if "nextPageToken" not in page:
                break
            query["pageToken"] = page["nextPageToken"]
        # A name that ends in a slash is a console's placeholder for an empty folder.
        entries = (_entry(item, root) for item in items if not item["name"].endswith("/"))
        date = headers.get("Date")
        now = parsedate_to_datetime(date).timestamp() if date else time.time()
        return Listing(tuple(sorted(entries, key=lambda entry: entry.name)), now)

    def delete(self, name: str) -> None:
        """See `ObjectStore`."""
        self._delete(name, {})

    def free_bytes(self) -> int | None:
        """See `ObjectStore`: a bucket has no limit."""
        return None

    @property
    def _fs(self) -> Any:
        # The event loop thread of gcsfs does not survive a fork; a connection made before it would hang.
        if self._owner != os.getpid():
            self._owner, self._connection = os.getpid(), _connect(self.retry)
        return self._connection

    def _key(self, name: str) -> str:
        check_name(name)
        return f"{self.prefix}/{name}" if self.prefix else name

    def _create(self, name: str, file: BinaryIO, want: ObjectInfo) -> Created:
        nonce = uuid.uuid4().hex
        try:
            self._upload(name, file, want, nonce, {"ifGenerationMatch": "0"})
            taken = False
        except FileExistsError:
            taken = True  # perhaps by this call, if the reply to an earlier try was lost
        fault_point("bucket.sent")
        found = self._stat(name)
        if found is None:
            raise RunError(f"{self.url}/{name} was written but is gone; check whether something deletes objects there")
        ours = found.get("metadata", {}).get(_WRITER) == nonce
        if _metadata_info(found) == want:
            return Created.CREATED if ours or not taken else Created.ALREADY_SAME
        if ours:
            self._delete(name, {"ifGenerationMatch": found["generation"]})
            raise RunError(f"{self.url}/{name} was damaged on upload and has been removed; run again to resume")
        if taken:
            return Created.ALREADY_DIFFERENT
        # Another writer replaced our object, so it must not be deleted.
        raise RunError(f"{self.url}/{name} was replaced during the upload; check what else writes there")

    def _upload(self, name: str, file: BinaryIO, info: ObjectInfo, nonce: str, condition: dict[str, str]) -> None:
        """Send an object with its checksum; FileExistsError if the condition does not hold.

        gcsfs's own uploads are not used: they send no checksum, so that damage is found only after the commit, and they
        separate the parts of a small upload by bare line feeds and a fixed boundary, which stricter servers refuse.
        """
        resource = {
            "name": self._key(name),
            "crc32c": base64.b64encode(bytes.fromhex(info.crc32c)).decode(),
            "contentType": "application/octet-stream",
            "metadata": {_WRITER: nonce},
        }
        send = self._send_whole if info.size <= UPLOAD_CHUNK else self._send_chunks
        with self._errors("write", name):
            for _ in range(self.retry.tries):
                try:
                    return send(resource, file, info.size, condition)
                except FileNotFoundError as exc:
                    raise self._no_bucket() from exc
                except _UploadLostError:
                    continue
            raise RunError(f"the server lost the upload {self.retry.tries} times; run again to resume")

    def _send_whole(self, resource: dict[str, Any], file: BinaryIO, size: int, condition: dict[str, str]) -> None:
        boundary = uuid.uuid4().hex
        file.seek(0)
        head = f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(resource)}\r\n"
        media = f"--{boundary}\r\nContent-Type: {resource['contentType']}\r\n\r\n"
        self._fs.call(
            "POST",
            self._upload_url,
            headers={"Content-Type": f"multipart/related; boundary={boundary}"},
            data=b"".join([head.encode(), media.encode(), file.read(size), f"\r\n--{boundary}--\r\n".encode()]),
            uploadType="multipart",
            **condition,
        )

    def _send_chunks(self, resource: dict[str, Any], file: BinaryIO, size: int, condition: dict[str, str]) -> None:
        headers = {"X-Upload-Content-Type": resource["contentType"], "X-Upload-Content-Length": str(size)}
        reply, _ = self._fs.call(
            "POST", self._upload_url, headers=headers, json=resource, uploadType="resumable", **condition
        )
        session, offset = reply["Location"], 0
        while True:
            file.seek(offset)
            chunk = file.read(UPLOAD_CHUNK)
            headers = {"Content-Range": f"bytes {offset}-{offset + len(chunk) - 1}/{size}"}
            reply, document = self._fs.call("PUT", session, headers=headers, data=chunk)
            if document:
                return
            # Not complete: Range names the bytes that the server kept, which may be fewer than were sent.
            kept = int(reply["Range"].rpartition("-")[2]) + 1 if "Range" in reply else 0
            if kept <= offset:
                raise _UploadLostError
            offset = kept
            fault_point("bucket.chunk")

    @property
    def _upload_url(self) -> str:
        return f"{self._fs._location}/upload/storage/v1/b/{self.bucket}/o"

    def _stat(self, name: str) -> dict[str, Any] | None:
        with self._errors("look up", name):
            try:
                return self._fs.call("GET", "b/{}/o/{}", self.bucket, self._key(name), json_out=True)
            except FileNotFoundError:
                return None

    def _page(self, query: dict[str, str]) -> tuple[Any, dict[str, Any]]:
        """A page of a listing, with the headers of the reply."""
        with self._errors("list", query["prefix"].removeprefix(f"{self.prefix}/")):
            try:
                headers, page = self._fs.call("GET", "b/{}/o", self.bucket, **query)
                return headers, json.loads(page)
            except FileNotFoundError as exc:
                raise self._no_bucket() from exc

    def _delete(self, name: str, condition: dict[str, str]) -> None:
        with self._errors("delete", name), contextlib.suppress(FileNotFoundError, FileExistsError):
            self._fs.call("DELETE", "b/{}/o/{}", self.bucket, self._key(name), **condition)

    def _read_range(self, name: str, generation: str, first: int, last: int) -> bytes:
        with self._errors("read", name):
            _, data = self._media(name, {"Range": f"bytes={first}-{last}"}, generation=generation)
        if len(data) != last - first + 1:
            raise RunError(f"cannot read {self.url}/{name}: got {len(data)} bytes instead of {last - first + 1}")
        return data

    def _media(self, name: str, headers: dict[str, str], **query: str) -> tuple[Any, bytes]:
        target = f"{self._fs._location}/download/storage/v1/b/{self.bucket}/o/{quote(self._key(name), safe='')}"
        try:
            return self._fs.call("GET", target, headers=headers, alt="media", **query)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.url}/{name}") from None

    def _no_bucket(self) -> RunError:
        return RunError(
            f"no bucket {self.bucket}; check the name, or run `gcloud storage buckets create gs://{self.bucket}`"
        )

    @contextlib.contextmanager
    def _errors(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except RunError as exc:
            raise RunError(f"cannot {verb} {self.url}/{name}: {exc}") from exc


def _connect(retry: RetryPolicy) -> Any:
    """A gcsfs file system that retries requests by our policy instead of gcsfs's fixed one."""
    endpoint = _emulator()
    if endpoint:
        # gcsfs decides on import whether to use gRPC, which emulators of the JSON API do not support.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import aiohttp
    from gcsfs.core import GCSFileSystem
    from google.auth.exceptions import GoogleAuthError

    timeout = aiohttp.ClientTimeout(sock_connect=retry.connect_timeout_s, sock_read=retry.read_timeout_s)
    try:
        fs = GCSFileSystem(
            token="anon" if endpoint else "google_default",
            endpoint_url=endpoint,
            use_listings_cache=False,
            requests_timeout=timeout,
            skip_instance_cache=True,
        )
    except GoogleAuthError as exc:
        raise RunError(f"no Google Cloud credentials were found; {SIGN_IN}") from exc
    once = getattr(GCSFileSystem._request, "__wrapped__", GCSFileSystem._request)
    fs._request = functools.partial(_request, functools.partial(once, fs), retry)
    return fs


def _emulator() -> str | None:
    try:
        return emulator_url()
    except ModelError as error:
        raise UsageError(str(error)) from error


async def _request(once: Callable[..., Any], retry: RetryPolicy, method: str, path: str, *args: Any, **kw: Any) -> Any:
    """gcsfs's single request, retried after transient failures.

    Sending a chunk of a resumable upload again is safe: the server skips the bytes that it has.
    Raises FileNotFoundError (404), FileExistsError (412), _UploadLostError, and RunError for everything else.
    """
    in_session = "upload_id=" in path
    for failures in itertools.count(1):
        try:
            async with asyncio.timeout(None if method == "GET" else retry.write_timeout_s):
                return await once(method, path, *args, **kw)
        except FileExistsError:
            raise
        except Exception as exc:
            code = _status(exc)
            if in_session and (code in (404, 410) or _is_damage(exc, code)):
                raise _UploadLostError from exc
            if code == 404:
                raise
            if failures >= retry.tries or not _is_transient(exc, code):
                raise RunError(_explain(exc, code, failures)) from exc
        await asyncio.sleep(retry.delay_s(failures))
    raise AssertionError("unreachable")


def _status(exc: Exception) -> int | None:
    """The HTTP status of an exception of gcsfs; None for a connection failure."""
    from requests.exceptions import ProxyError

    if isinstance(exc, FileNotFoundError):
        return 404
    if isinstance(exc, ProxyError):
        return 502
    if isinstance(exc, ValueError):
        return 400
    if isinstance(exc, OSError) and str(exc).startswith("Forbidden"):
        return 403
    code = str(getattr(exc, "code", ""))
    return int(code) if code.isdigit() else None


def _is_damage(exc: Exception, code: int | None) -> bool:
    """Whether the server refused an upload whose bytes do not match the checksum sent with it."""
    return code == 400 and "crc32c" in str(exc).lower()


def _is_transient(exc: Exception, code: int | None) -> bool:
    from aiohttp import ClientError
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    if isinstance(exc.__cause__, GoogleAuthError):
        return exc.__cause__.retryable
    if isinstance(exc, GoogleAuthError):
        return exc.retryable
    if code is not None:
        return code in (408, 429) or code >= 500 or _is_damage(exc, code)
    return isinstance(exc, ClientError | RequestException | TimeoutError | ConnectionError)


def _explain(exc: Exception, code: int | None, tries: int) -> str:
    from google.auth.exceptions import GoogleAuthError

    reason = redact(" ".join(str(exc).split()))[:200] or type(exc).__name__
    if code == 401 or isinstance(exc, GoogleAuthError) or isinstance(exc.__cause__, GoogleAuthError):
        return f"not signed in to Google Cloud, or the sign-in expired ({reason}); {SIGN_IN}"
    if code == 403:
        return f"access denied ({reason}); give the account the role Storage Object Admin on the bucket"
    if code is not None and code < 500 and code not in (408, 429):
        return f"refused with {code} ({reason})"
    failed = f"HTTP {code}" if code else type(exc).__name__
    return f"{failed} on each of {tries} tries ({reason}); check the network, then run again to resume"


def _entry(item: dict[str, str], root: str) -> Entry:
    modified = datetime.fromisoformat(item["updated"]).timestamp()
    return Entry(item["name"].removeprefix(root), int(item["size"]), modified, item["generation"])


def _metadata_info(found: dict[str, Any]) -> ObjectInfo:
    return ObjectInfo(int(found["size"]), base64.b64decode(found["crc32c"]).hex())


def _matches_hash(headers: list[str], data: bytes) -> bool:
    values = (part.strip() for header in headers for part in header.split(","))
    stored = [part.removeprefix("crc32c=") for part in values if part.startswith("crc32c=")]
    return all(base64.b64decode(value).hex() == bytes_info(data).crc32c for value in stored)
