"""Worker processes by the hundred: one process imports everything once, and each worker is a fork of it.

with Nursery() as nursery:
    worker = nursery.start(Worker(flags={...}, fault="commit.before@2=kill"))
    worker.kill(); worker.wait()
"""

import argparse
import importlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tiny_run import REPOSITORY

HERE = Path(__file__).parent
# What a test process cannot end otherwise ends here.
_LONGEST_S = 120.0


@dataclass(frozen=True)
class Worker:
    """What a worker is to do.

    Attributes:
      flags: of `RunConfig`.
      fault: as in the environment variable of `core.base.fault_points`.
      step_s, rounding, width, weights, stuck_after: of the light model.
      clock_s: how far the wall clock is off; clock_jumps: by how much more at some looks.
      retry: of `RetryPolicy`.
      upload_chunk: bytes.
      points_file: where the points that it came by are listed at its end, with how often.
      change: a name in `changes.CHANGES`.
      free_bytes: what the disk claims to have free.
    """

    flags: dict[str, Any]
    fault: str | None = None
    step_s: float = 0.0
    rounding: float = 0.0
    width: int = 8
    weights: int = 0
    stuck_after: int | None = None
    clock_s: float = 0.0
    clock_jumps: float = 0.0
    retry: dict[str, float] = field(
        default_factory=lambda: {"base_s": 0.005, "cap_s": 0.05, "connect_timeout_s": 5.0, "read_timeout_s": 5.0}
    )
    upload_chunk: int | None = None
    points_file: str | None = None
    change: str | None = None
    free_bytes: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


class Running:
    """A worker process."""

    def __init__(self, nursery: "Nursery", pid: int, folder: Path) -> None:
        self.pid = pid
        self._nursery = nursery
        self._folder = folder

    def signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.returncode is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return

    def kill(self) -> None:
        """SIGKILL."""
        self.signal(signal.SIGKILL)

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal's number for one that a signal ended."""
        return self._nursery.exits.get(self.pid)

    def wait(self, seconds: float = _LONGEST_S) -> int:
        """The exit code."""
        with self._nursery.changed:
            if not self._nursery.changed.wait_for(lambda: self.returncode is not None, seconds):
                raise TimeoutError(f"worker {self.pid} did not end in {seconds} s: {self.errors[-2000:]}")
        code = self.returncode
        assert code is not None
        return code

    def finish(self) -> dict[str, Any]:
        """The summary of a worker that must end well."""
        code = self.wait()
        assert code == 0, f"exit code {code}: {self.errors[-3000:]}"
        return json.loads((self._folder / "out").read_text())

    @property
    def errors(self) -> str:
        """What it wrote on stderr."""
        return (self._folder / "err").read_text()

    def is_stopped(self) -> bool:
        """Whether SIGSTOP holds it."""
        stat = Path(f"/proc/{self.pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "T"


class Nursery:
    """Starts workers."""

    def __init__(self) -> None:
        environment = {
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(HERE), str(HERE.parent)]),
        }
        self._folder = tempfile.TemporaryDirectory(prefix="nursery")
        self._count = 0
        self.exits: dict[int, int] = {}
        self.changed = threading.Condition()
        self._pids: list[int] = []
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "nursery.py")],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._folder.cleanup()

    def start(self, worker: Worker) -> Running:
        """Starts a worker and returns at once."""
        self._count += 1
        folder = Path(self._folder.name, str(self._count))
        folder.mkdir()
        for name in ("out", "err"):
            (folder / name).touch()
        assert self._process.stdin is not None
        with self.changed:
            before = len(self._pids)
            self._process.stdin.write(json.dumps({"folder": str(folder)} | asdict(worker)) + "\n")
            self._process.stdin.flush()
            assert self.changed.wait_for(lambda: len(self._pids) > before, 60), "the nursery is dead"
            return Running(self, self._pids[before], folder)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            news = json.loads(line)
            with self.changed:
                if "exit" in news:
                    self.exits[news["exit"]] = news["code"]
                else:
                    self.exits.pop(news["pid"], None)
                    self._pids.append(news["pid"])
                self.changed.notify_all()


def _serve() -> None:
    """The nursery's own process: has no thread, so that forking it is safe."""
    # Whatever a worker needs is imported once, before the first fork: JAX alone takes a second.
    for name in ("gcsfs", "light_engine", "extract_activations", "core.run.runner", "core.object_store.gcs"):
        importlib.import_module(name)
    children: set[int] = set()
    pending = b""
    while True:
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            children.discard(pid)
            print(json.dumps({"exit": pid, "code": os.waitstatus_to_exitcode(status)}), flush=True)
        if not select.select([0], [], [], 0.005 if children else 1.0)[0]:
            continue
        read = os.read(0, 1 << 16)
        if not read:
            break
        *lines, pending = (pending + read).split(b"\n")
        for line in lines:
            pid = os.fork()
            if not pid:
                _be(json.loads(line))
            children.add(pid)
            print(json.dumps({"pid": pid}), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _be(wish: dict[str, Any]) -> None:
    """The forked worker; does not return."""
    folder = Path(wish.pop("folder"))
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY), number)
    os.close(0)
    code = 1
    try:
        code = work(Worker(**wish))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def work(worker: Worker) -> int:
    """Runs the command in this process, as the top-level script does; returns its exit code."""
    from absl.flags import FLAGS, argparse_flags

    import extract_activations
    from core.base import command_line

    os.environ.update(worker.environment)
    prepare(worker)
    wanted = argparse.Namespace(**worker.flags, verbose=False, json=True)
    parser = argparse_flags.ArgumentParser()
    parser.parse_args = lambda *_: FLAGS.mark_as_parsed() or wanted
    try:
        command_line.run_command(extract_activations.run_flags, lambda: parser)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def prepare(worker: Worker) -> None:
    """Makes this process the worker that is wanted."""
    from light_engine import LightBackend

    import core.object_store
    import core.object_store.gcs
    import core.run.job
    import core.run.runner
    from core.base import fault_points

    backend = LightBackend(worker.step_s, worker.rounding, worker.weights, worker.width, worker.stuck_after)
    core.run.checks.backend_of = core.run.runner.backend_of = lambda config: backend
    policy = core.object_store.RetryPolicy(**worker.retry)
    core.object_store.RetryPolicy = lambda: policy
    if worker.upload_chunk is not None:
        core.object_store.gcs.UPLOAD_CHUNK = worker.upload_chunk
    if worker.free_bytes is not None:
        core.object_store.LocalStore.free_bytes = lambda self: worker.free_bytes
    if worker.clock_s or worker.clock_jumps:
        _set_clock(worker.clock_s, worker.clock_jumps)
    if worker.change is not None:
        from changes import CHANGES

        CHANGES[worker.change]()
    if worker.fault is not None:
        fault_points.arm(fault_points.armed_by(worker.fault))
    if worker.points_file is not None:
        fault_points.arm(_Points(Path(worker.points_file)))


class _Points:
    """Counts the points that a worker comes by."""

    def __init__(self, path: Path) -> None:
        self._path, self._counts, self._lock = path, Counter[str](), threading.Lock()

    def __call__(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1
            self._path.write_text(json.dumps(self._counts))


def _set_clock(offset: float, jump: float) -> None:
    """A wall clock that is wrong, and jumps to and fro from look to look."""
    real, rng = time.time, random.Random(os.getpid())
    time.time = lambda: real() + offset + jump * rng.randrange(2)
    time.time_ns = lambda: int(time.time() * 1e9)


if __name__ == "__main__":
    _serve()
