"""The tests' fake of Google Cloud Storage in a process of its own, so that its work is not ours.

It keeps objects in memory and answers as the JSON API does. A link of a given speed may stand before it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUCKET = "bench"
_TESTS = Path(__file__).resolve().parent.parent / "tests"
_SERVER = f"""
import json, sys
from fake_gcs import FakeGcs, gcs_environment
with FakeGcs(["{BUCKET}"], float(sys.argv[1]) or None) as server:
    print(json.dumps(gcs_environment(server)), flush=True)
    sys.stdin.read()
"""


@contextmanager
def bucket_server(megabytes_per_second: float = 0) -> Iterator[str]:
    """The URL of an empty bucket; this process's environment leads there meanwhile. 0: as fast as loopback is."""
    command = [sys.executable, "-c", _SERVER, str(megabytes_per_second * 1e6)]
    before = dict(os.environ)
    with subprocess.Popen(command, cwd=_TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            os.environ |= json.loads(server.stdout.readline())
            yield f"gs://{BUCKET}"
        finally:
            server.stdin.close()
            os.environ.clear()
            os.environ |= before
