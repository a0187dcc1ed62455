"""The tests' fake of Google Cloud Storage in a separate process, so that its CPU time is not counted as ours.

It keeps objects in memory and answers as the JSON API does, optionally through a link of limited speed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BUCKET = "bench"
_TESTS = Path(__file__).resolve().parents[2] / "tests"
_SERVER = f"""
import json, sys
from fake_gcs import FakeGcs, gcs_environment
with FakeGcs(["{BUCKET}"], float(sys.argv[1]) or None) as server:
    print(json.dumps(gcs_environment(server)), flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Bucket:
    """A bucket on loopback, and the process that answers for it."""

    url: str
    pid: int

    def cpu_seconds(self) -> float:
        """CPU time of the server so far; 0 where there is no /proc."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return 0.0
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def bucket_server(megabytes_per_second: float = 0) -> Iterator[Bucket]:
    """An empty bucket; inside the context this process's environment points to it. 0: the speed of loopback."""
    command = [sys.executable, "-c", _SERVER, str(megabytes_per_second * 1e6)]
    before = dict(os.environ)
    with subprocess.Popen(command, cwd=_TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            os.environ |= json.loads(server.stdout.readline())
            yield Bucket(f"gs://{BUCKET}", server.pid)
        finally:
            server.stdin.close()
            os.environ.clear()
            os.environ |= before
