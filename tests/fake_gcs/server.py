"""Sockets around the API: the server, its connections, what faults do to them, and the request log."""

from __future__ import annotations

import dataclasses
import http
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from fake_gcs.api import Reply, Request, answer, error_reply, flip_bit, object_name, parse_call, persist_part
from fake_gcs.faults import (
    Action,
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
from fake_gcs.state import ApiError, GcsState


@dataclass(frozen=True)
class LoggedRequest:
    """What was asked and answered; status None: the connection was reset instead."""

    method: str
    path: str
    kind: str
    query: dict[str, str]
    status: int | None


class FakeGcs:
    """The server. Listens while the `with` block runs; state, faults and log stay readable afterwards.

    With `bytes_per_second` what clients send passes a link of that speed, which all connections share.
    """

    def __init__(self, buckets: Iterable[str] = ("bucket",), bytes_per_second: float | None = None) -> None:
        self.state = GcsState()
        self.faults = Faults()
        self.requests: list[LoggedRequest] = []
        self.closing = threading.Event()
        self._bytes_per_second = bytes_per_second
        self._link = threading.Lock()
        self._link_free_at = 0.0
        for bucket in buckets:
            self.state.create_bucket(bucket)
        self._http = _HttpServer(("127.0.0.1", 0), _Handler)
        self._http.fake = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> FakeGcs:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        self._http.drop_connections()

    def pass_link(self, n_bytes: int) -> None:
        """Returns when the link has carried so many bytes more."""
        if self._bytes_per_second is None:
            return
        with self._link:
            self._link_free_at = max(self._link_free_at, time.monotonic()) + n_bytes / self._bytes_per_second
            arrival = self._link_free_at
        time.sleep(max(0.0, arrival - time.monotonic()))

    def objects(self, bucket: str = "bucket") -> dict[str, bytes]:
        """Every live object's bytes by name."""
        with self.state.lock:
            return {name: found.data for name, found in sorted(self.state.buckets[bucket].items())}

    def generations(self, name: str, bucket: str = "bucket") -> list[int]:
        """Every generation that this name ever had, oldest first."""
        with self.state.lock:
            return [generation for b, n, generation in self.state.history if (b, n) == (bucket, name)]

    def corrupt(self, name: str, offset: int = 0, bucket: str = "bucket") -> None:
        """Flip one bit of a stored object and leave its checksums as they are: damage at rest."""
        with self.state.lock:
            found = self.state.buckets[bucket][name]
            self.state.buckets[bucket][name] = dataclasses.replace(found, data=flip_bit(found.data, offset))

    def count(self, kind: str) -> int:
        """How many requests of this kind, or with this prefix, came in."""
        return sum(r.kind == kind or r.kind.startswith(kind + ".") for r in list(self.requests))


def gcs_environment(server: FakeGcs) -> dict[str, str]:
    """The environment variables with which a child process (and its gcsfs) talks to this server and to nothing else."""
    return {
        "STORAGE_EMULATOR_HOST": server.url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "NO_GCE_CHECK": "true",
        "NO_PROXY": "127.0.0.1,localhost",
    }


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    fake: FakeGcs

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self._connections: set[socket.socket] = set()

    def finish_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:  # type: ignore[override]
        self._connections.add(request)
        try:
            super().finish_request(request, client_address)
        finally:
            self._connections.discard(request)

    def drop_connections(self) -> None:
        """End the kept-alive connections, whose threads otherwise wait for their clients."""
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _HttpServer

    def _serve(self) -> None:
        fake = self.server.fake
        headers = {key.lower(): value for key, value in self.headers.items()}
        body = self._read_body(headers)
        fake.pass_link(len(body))
        call, names = parse_call(self.command, self.path, headers)
        base_url = f"http://{headers.get('host', '127.0.0.1')}"
        call = dataclasses.replace(call, object=object_name(fake.state, call, names, body))
        action = fake.faults.take(call)
        reply = _reply(fake, Request(call, names, headers, body, base_url), action)
        status = None if reply is None else reply.status
        fake.requests.append(LoggedRequest(call.method, call.path, call.kind, call.query, status))
        if reply is None:
            self._reset()
        else:
            self._send(reply, action.share if isinstance(action, TruncateBody) else 1.0)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _read_body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        out = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            continue
        return bytes(out)

    def _send(self, reply: Reply, share: float) -> None:
        phrases = {308: "Resume Incomplete", 499: "Client Closed Request"}
        phrase = phrases.get(reply.status) or http.HTTPStatus(reply.status).phrase
        date = ("Date", self.date_time_string())
        lines = [f"HTTP/1.1 {reply.status} {phrase}", *(f"{key}: {value}" for key, value in (date, *reply.headers))]
        if reply.status not in (204, 304):
            lines.append(f"Content-Length: {len(reply.body)}")
        sent = reply.body if share == 1.0 else reply.body[: int(len(reply.body) * share)]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + sent)
        self.close_connection = self.close_connection or share != 1.0

    def _reset(self) -> None:
        # Linger 0 turns close into RST; detach, because rfile and wfile would keep the descriptor open.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """The request log is `FakeGcs.requests`; nothing goes to stderr."""


def _reply(fake: FakeGcs, request: Request, action: Action | None) -> Reply | None:
    """The answer under a fault; None: reset the connection."""
    match action:
        case Reset():
            return None
        case Status(code):
            return _injected(code)
        case Stall(seconds):
            fake.closing.wait(seconds)
        case PersistPart(n_bytes, code):
            kept = persist_part(fake.state, request, n_bytes)
            return kept if code == 308 else _injected(code)
        case CorruptUpload(offset):
            request = dataclasses.replace(request, damage=offset)
    reply = answer(fake.state, request)
    match action:
        case CommitThenReset():
            return None
        case CommitThenStatus(code):
            return _injected(code)
    return reply


def _injected(code: int) -> Reply:
    reasons = {401: "authError", 403: "forbidden", 404: "notFound", 408: "requestTimeout", 429: "rateLimitExceeded"}
    messages = {401: "Request had no credentials.", 403: "Caller does not have storage.objects access."}
    reason = reasons.get(code, "backendError")
    return error_reply(ApiError(code, reason, messages.get(code, http.HTTPStatus(code).phrase)))
