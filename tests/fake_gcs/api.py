"""The JSON API without sockets: from a parsed request and the state to an answer."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from fake_gcs.faults import Call
from fake_gcs.state import ApiError, GcsState, StoredObject, invalid

_ROUTES = (
    (re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)"), {"POST": "object.rewrite"}),
    (re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/copyTo/b/([^/]+)/o/([^/]+)"), {"POST": "object.copy"}),
    (re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)"), {"POST": "object.move"}),
    (re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/compose"), {"POST": "object.compose"}),
    (
        re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)"),
        {"GET": "object.get", "DELETE": "object.delete", "PATCH": "object.patch"},
    ),
    (re.compile(r"/storage/v1/b/([^/]+)/o"), {"GET": "object.list"}),
    (re.compile(r"/upload/storage/v1/b/([^/]+)/o"), {"POST": "upload", "PUT": "upload", "DELETE": "upload"}),
    (re.compile(r"/storage/v1/b/([^/]+)"), {"GET": "bucket.get", "DELETE": "bucket.delete"}),
    (re.compile(r"/storage/v1/b"), {"GET": "bucket.list", "POST": "bucket.insert"}),
    (re.compile(r"/batch/storage/v1"), {"POST": "batch"}),
)


@dataclass(frozen=True)
class Request:
    """A parsed request: the call, the path's names, lower-case headers and the whole body.

    damage: offset of a media byte that is damaged on its way into the store, or None.
    """

    call: Call
    names: tuple[str, ...]
    headers: dict[str, str]
    body: bytes
    base_url: str
    damage: int | None = None

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; empty if there is none."""
        try:
            return json.loads(self.body) if self.body else {}
        except ValueError:
            raise ApiError(400, "parseError", "Parse Error") from None


@dataclass(frozen=True)
class Reply:
    """A finished answer."""

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


def parse_call(method: str, target: str, headers: dict[str, str]) -> tuple[Call, tuple[str, ...]]:
    """What a request line asks for, and the decoded names in its path."""
    parts = urlsplit(target)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    for pattern, kinds in _ROUTES:
        match = pattern.fullmatch(parts.path)
        if match and method in kinds:
            kind = kinds[method]
            if kind == "upload":
                kind = _upload_kind(method, query, headers)
            elif kind == "object.get" and query.get("alt") == "media":
                kind = "object.media"
            return Call(method, parts.path, kind, query), tuple(unquote(name) for name in match.groups())
    return Call(method, parts.path, "unknown", query), ()


def object_name(state: GcsState, call: Call, names: tuple[str, ...], body: bytes) -> str:
    """The name of the object that a call is about; empty where there is none, or none that can be told."""
    if "upload_id" in call.query:
        upload = state.uploads.get(call.query["upload_id"])
        return upload.name if upload else ""
    if call.kind.startswith("upload."):
        named = re.search(rb'"name": ?("(?:[^"\\]|\\.)*")', body[:4096])
        return json.loads(named[1]) if named else call.query.get("name", "")
    return names[1] if len(names) > 1 else ""


def _upload_kind(method: str, query: dict[str, str], headers: dict[str, str]) -> str:
    if "upload_id" in query:
        if method == "DELETE":
            return "upload.cancel"
        is_query = re.fullmatch(r"bytes \*/(\*|[1-9]\d*)", headers.get("content-range", ""))
        return "upload.query" if is_query else "upload.chunk"
    kinds = {"resumable": "upload.start", "multipart": "upload.multipart", "media": "upload.media"}
    return kinds.get(query.get("uploadType", ""), "unknown")


def _json(document: Any, status: int = 200) -> Reply:
    body = json.dumps(document).encode()
    return Reply(status, body, (("Content-Type", "application/json; charset=UTF-8"),))


def _selected(document: dict[str, Any], fields: str | None) -> dict[str, Any]:
    """Partial response: `a,b(c,d)` keeps a, and c and d of b (an object or a list of them)."""
    if not fields:
        return document
    out: dict[str, Any] = {}
    for key, _, inner in re.findall(r"(\w+)(\(([^)]*)\))?", fields):
        value = document.get(key)
        if isinstance(value, list) and inner:
            out[key] = [_selected(item, inner) for item in value]
        elif value is not None:
            out[key] = _selected(value, inner) if inner else value
    return out


def _resource(found: StoredObject, request: Request) -> Reply:
    return _json(_selected(found.resource(request.base_url), request.call.query.get("fields")))


def _list_buckets(state: GcsState, request: Request) -> Reply:
    return _json({"kind": "storage#buckets", "items": [state.bucket_resource(name) for name in sorted(state.buckets)]})


def _insert_bucket(state: GcsState, request: Request) -> Reply:
    return _json(state.create_bucket(request.json()["name"]))


def _delete_bucket(state: GcsState, request: Request) -> Reply:
    state.delete_bucket(request.names[0])
    return Reply(204)


def _list_objects(state: GcsState, request: Request) -> Reply:
    page = state.list_objects(request.names[0], request.call.query, request.base_url)
    return _json(_selected(page, request.call.query.get("fields")))


def _get_media(state: GcsState, request: Request) -> Reply:
    found = state.get(request.names[0], request.names[1], request.call.query)
    size = len(found.data)
    headers = (
        ("Content-Type", found.settings.get("contentType", "application/octet-stream")),
        ("ETag", found.etag),
        ("X-Goog-Generation", str(found.generation)),
        ("X-Goog-Metageneration", str(found.metageneration)),
        ("X-Goog-Storage-Class", "STANDARD"),
        ("X-Goog-Stored-Content-Length", str(size)),
        ("X-Goog-Hash", found.hash_header),
    )
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if match is None or match.groups() == ("", ""):
        return Reply(200, found.data, headers)
    first, last = _range(match[1], match[2], size)
    if first >= size or last < first:
        text = b"Request range not satisfiable"
        return Reply(416, text, (("Content-Type", "text/plain"), ("Content-Range", f"bytes */{size}")))
    return Reply(206, found.data[first : last + 1], (*headers, ("Content-Range", f"bytes {first}-{last}/{size}")))


def _range(first: str, last: str, size: int) -> tuple[int, int]:
    if not first:
        return (max(size - int(last), 0) if int(last) else size), size - 1
    return int(first), min(int(last), size - 1) if last else size - 1


def _delete(state: GcsState, request: Request) -> Reply:
    state.delete(request.names[0], request.names[1], request.call.query)
    return Reply(204)


def _rewrite(state: GcsState, request: Request) -> Reply:
    source, target = request.names[:2], request.names[2:]
    new = state.copy((source[0], source[1]), (target[0], target[1]), request.json(), request.call.query)
    resource = new.resource(request.base_url)
    if request.call.kind == "object.copy":
        return _json(resource)
    size = resource["size"]
    return _json(
        {
            "kind": "storage#rewriteResponse",
            "totalBytesRewritten": size,
            "objectSize": size,
            "done": True,
            "resource": resource,
        }
    )


def _upload_multipart(state: GcsState, request: Request) -> Reply:
    resource, media, content_type = parse_related(request.headers.get("content-type", ""), request.body)
    if content_type:
        resource.setdefault("contentType", content_type)
    return _insert(state, request, resource, media)


def _upload_media(state: GcsState, request: Request) -> Reply:
    return _insert(state, request, {"contentType": request.headers.get("content-type")}, request.body)


def _insert(state: GcsState, request: Request, resource: dict[str, Any], media: bytes) -> Reply:
    resource = {**resource, **_hash_header(request.headers)}
    media = flip_bit(media, request.damage)
    return _resource(state.insert(request.names[0], resource, media, request.call.query), request)


def _start_upload(state: GcsState, request: Request) -> Reply:
    resource = request.json()
    resource.setdefault("contentType", request.headers.get("x-upload-content-type"))
    upload_id = state.start_upload(request.names[0], {**resource, **_hash_header(request.headers)}, request.call.query)
    location = f"{request.base_url}{request.call.path}?uploadType=resumable&upload_id={upload_id}"
    return Reply(200, b"", (("Location", location), ("X-GUploader-UploadID", upload_id)))


def _upload_chunk(state: GcsState, request: Request) -> Reply:
    first, total = content_range(request)
    done = state.upload_chunk(request.call.query["upload_id"], first, total, flip_bit(request.body, request.damage))
    if isinstance(done, StoredObject):
        return _resource(done, request)
    return _resume_incomplete(done)


def _resume_incomplete(persisted: int) -> Reply:
    return Reply(308, b"", (("Range", f"bytes=0-{persisted - 1}"),) if persisted else ())


def persist_part(state: GcsState, request: Request, n_bytes: int) -> Reply:
    """Keep the first bytes of a chunk as an interrupted server would, and say how much is there."""
    first, _ = content_range(request)
    done = state.upload_chunk(request.call.query["upload_id"], first, None, request.body[:n_bytes])
    return _resume_incomplete(done) if isinstance(done, int) else _resource(done, request)


def flip_bit(data: bytes, offset: int | None) -> bytes:
    """The data with the lowest bit of one byte inverted; unchanged for None or an offset outside."""
    if offset is None or offset >= len(data):
        return data
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


def content_range(request: Request) -> tuple[int | None, int | None]:
    """First byte (None: a status query or an empty finish) and total size (None: not yet known)."""
    header = request.headers.get("content-range")
    if header is None:
        return 0, len(request.body)
    match = re.fullmatch(r"bytes (?:\*|(\d+)-(\d+|\*))/(\d+|\*)", header)
    if match is None:
        raise invalid(f"Failed to parse Content-Range header: {header}")
    first, last, total = match.groups()
    if first is not None and last != "*" and int(last) - int(first) + 1 != len(request.body):
        raise invalid("Invalid request. The size of the body does not match the Content-Range header.")
    return None if first is None else int(first), None if total == "*" else int(total)


def _cancel_upload(state: GcsState, request: Request) -> Reply:
    state.cancel_upload(request.call.query["upload_id"])
    return Reply(499)


def _hash_header(headers: dict[str, str]) -> dict[str, str]:
    keys = {"crc32c": "crc32c", "md5": "md5Hash"}
    pairs = (part.strip().partition("=") for part in headers.get("x-goog-hash", "").split(",") if part.strip())
    return {keys[key]: value for key, _, value in pairs if key in keys}


def parse_related(content_type: str, body: bytes) -> tuple[dict[str, Any], bytes, str | None]:
    """Metadata, media and media type of a multipart/related body.

    Lines may end in CRLF or, as gcsfs sends them, in LF; the first line decides, so that a media part ending in CR
    keeps its last byte.
    """
    match = re.search(r'boundary=(?:"([^"]+)"|([^;\s]+))', content_type)
    if match is None:
        raise invalid("Multipart upload without a boundary.")
    delimiter = b"--" + (match[1] or match[2]).encode()
    start = body.find(delimiter)
    newline = b"\r\n" if body[start + len(delimiter) :].startswith(b"\r\n") else b"\n"
    parts = (newline + body[max(start, 0) :]).split(newline + delimiter)
    if start < 0 or len(parts) != 4 or not parts[3].startswith(b"--"):
        raise invalid("Malformed multipart body.")
    heads, contents = zip(*(_head_and_content(part, newline) for part in parts[1:3]), strict=True)
    try:
        return json.loads(contents[0]), contents[1], heads[1].get("content-type")
    except ValueError:
        raise ApiError(400, "parseError", "Parse Error") from None


def _head_and_content(part: bytes, newline: bytes) -> tuple[dict[str, str], bytes]:
    head, separator, content = part.partition(newline + newline)
    if not separator:
        raise invalid("Malformed multipart body.")
    pairs = (line.partition(":") for line in head.decode("latin-1").splitlines() if line.strip())
    return {key.strip().lower(): value.strip() for key, _, value in pairs}, content


def _batch(state: GcsState, request: Request) -> Reply:
    """Each part is a request of its own, answered in order under the Content-ID `response-...`."""
    match = re.search(r'boundary=(?:"([^"]+)"|([^;\s]+))', request.headers.get("content-type", ""))
    if match is None:
        raise invalid("Batch request without a boundary.")
    out = []
    for part in request.body.decode("latin-1").split("--" + (match[1] or match[2]))[1:-1]:
        line = re.search(r"^(GET|DELETE|PATCH|POST) (\S+)(?: HTTP/1.1)?\r?$", part, re.MULTILINE)
        content_id = re.search(r"^Content-ID:\s*<?([^>\r\n]+)>?", part, re.MULTILINE | re.IGNORECASE)
        if line is None:
            raise invalid("Failed to parse batch request.")
        call, names = parse_call(line[1], line[2], {})
        reply = answer(state, dataclasses.replace(request, call=call, names=names, body=b""))
        out.append(_batch_part(reply, content_id[1] if content_id else ""))
    body = "".join(f"--batch_fake\r\n{part}\r\n" for part in out) + "--batch_fake--\r\n"
    return Reply(200, body.encode("latin-1"), (("Content-Type", "multipart/mixed; boundary=batch_fake"),))


def _batch_part(reply: Reply, content_id: str) -> str:
    phrase = {200: "OK", 204: "No Content", 404: "Not Found", 412: "Precondition Failed"}.get(reply.status, "Error")
    head = f"Content-Type: application/http\r\nContent-ID: <response-{content_id}>\r\n\r\n"
    return head + f"HTTP/1.1 {reply.status} {phrase}\r\nContent-Length: {len(reply.body)}\r\n\r\n" + reply.body.decode()


def answer(state: GcsState, request: Request) -> Reply:
    """Carry out one request; an ApiError becomes the answer that it stands for."""
    try:
        action = _ANSWERS.get(request.call.kind)
        return action(state, request) if action else error_reply(ApiError(404, "notFound", "Not Found"))
    except ApiError as exc:
        return error_reply(exc)


def error_reply(error: ApiError) -> Reply:
    """An error document, or the empty answer of 304."""
    return Reply(304) if error.code == 304 else _json(error.body(), error.code)


_ANSWERS = {
    "bucket.list": _list_buckets,
    "bucket.insert": _insert_bucket,
    "bucket.get": lambda state, request: _json(state.bucket_resource(request.names[0])),
    "bucket.delete": _delete_bucket,
    "object.list": _list_objects,
    "object.get": lambda state, request: _resource(state.get(*request.names, request.call.query), request),
    "object.media": _get_media,
    "object.delete": _delete,
    "object.patch": lambda state, request: _resource(
        state.patch(*request.names, request.json(), request.call.query), request
    ),
    "object.rewrite": _rewrite,
    "object.copy": _rewrite,
    "object.move": lambda state, request: _resource(state.move(*request.names, request.call.query), request),
    "object.compose": lambda state, request: _resource(
        state.compose(*request.names, request.json(), request.call.query), request
    ),
    "upload.media": _upload_media,
    "upload.multipart": _upload_multipart,
    "upload.start": _start_upload,
    "upload.chunk": _upload_chunk,
    "upload.query": _upload_chunk,
    "upload.cancel": _cancel_upload,
    "batch": _batch,
}
