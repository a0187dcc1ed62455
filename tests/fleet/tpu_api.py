"""The TPU API v2 on loopback, for the real gcloud: nodes, queued resources, operations.

ssh and scp also ask the Compute API for the project's keys; there are none.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

from fake_tpus import NODES, STOCKOUT, ApiError, FakeTpus

PATH = re.compile(r"/v2/projects/p/locations/([^/]+)/(nodes|queuedResources|operations)(?:/([^/]+))?")
STATUS = {3: 400, 5: 404, 6: 409, 7: 403, 8: 429, 9: 400, 14: 503}


class _Handler(BaseHTTPRequestHandler):
    tpus: FakeTpus

    def do_GET(self) -> None:
        self._answer("get")

    def do_POST(self) -> None:
        self._answer("create")

    def do_DELETE(self) -> None:
        self._answer("delete")

    def _answer(self, verb: str) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        try:
            status, answer = 200, self._work(verb, body)
        except ApiError as error:
            status = STATUS[error.code]
            answer = {"error": {"code": status, "status": error.status, "message": error.message}}
        if answer is None:
            status, text = 200, b"<html>not JSON</html>"
        else:
            text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _work(self, verb: str, body: dict[str, Any]) -> dict[str, Any] | None:
        url = urlparse(self.path)
        if url.path == "/compute/v1/projects/p":
            return {"name": "p"}
        match = PATH.fullmatch(url.path)
        if match is None:
            raise ApiError(5, "NOT_FOUND", f"no such path {url.path}")
        zone, collection, name = match.groups()
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if collection == "operations":
            return self._operation(zone, name)
        name = name or query.get("nodeId") or query.get("queuedResourceId") or ""
        verb = "list" if verb == "get" and not name else verb
        fault = self.tpus.note(verb, zone, name)
        if fault == "garbage":
            return None
        if verb == "list":
            return {collection: self.tpus.list(collection, zone)}
        if verb == "get":
            return self.tpus.get(collection, zone, name)
        if fault == "stockout":
            return self._operation(zone, "stockout")
        self._change(verb, zone, collection, name, body, force=query.get("force") == "true")
        return self._operation(zone, "done")

    def _change(self, verb: str, zone: str, collection: str, name: str, body: dict[str, Any], *, force: bool) -> None:
        if verb == "create" and collection == NODES:
            self.tpus.create_node(zone, name, body)
        elif verb == "create":
            self.tpus.create_queued(zone, name, body)
        elif collection == NODES:
            self.tpus.delete_node(zone, name)
        else:
            self.tpus.delete_queued(zone, name, force=force)

    def _operation(self, zone: str, name: str) -> dict[str, Any]:
        """Done when asked for; one named stockout ended so."""
        result = (
            {"error": {"code": 8, "message": STOCKOUT.format(zone=zone)}} if name == "stockout" else {"response": {}}
        )
        return {"name": f"projects/p/locations/{zone}/operations/{name}", "done": True} | result

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the service notes calls itself."""


@contextmanager
def serve(tpus: FakeTpus) -> Iterator[str]:
    """The API of this service; yields its URL."""
    handler = type("Handler", (_Handler,), {"tpus": tpus})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
