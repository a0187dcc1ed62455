"""Processes that need not import anything: one process imports it all once, and each of them is a fork of it.

with Forks() as forks:
    fork = forks.start("nursery:work", {...})
    fork.kill(); fork.wait()

A fork is a process like any other: it has a standard output and a standard error of its own, a folder, an environment,
an exit code and signals. Only what Python does before `main()` is not repeated.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
TESTS = Path(__file__).parent
# What the commands import, some of it late. No torch: it is as much again, for few of them.
IMPORTED = (
    "extract_activations",
    "analyze_activations",
    "create_dataset_streams",
    "analysis.verification.verify",
    "core.object_store.gcs",
    "core.run.runner",
    "core.run.sharded_run",
    "gcsfs",
    "jax.experimental.multihost_utils",
    "transformers",
)
# What a test process cannot end otherwise ends here.
LONGEST_S = 120.0


class Fork:
    """A process."""

    def __init__(self, forks: "Forks", pid: int, folder: Path) -> None:
        self.pid = pid
        self._forks = forks
        self._folder = folder

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.returncode is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal's number for one that a signal ended."""
        return self._forks.exits.get(self.pid)

    def wait(self, seconds: float = LONGEST_S) -> int:
        """The exit code; raises TimeoutError when there is none in time."""
        with self._forks.changed:
            if not self._forks.changed.wait_for(lambda: self.returncode is not None, seconds):
                raise TimeoutError(f"process {self.pid} did not end in {seconds} s: {self.errors[-2000:]}")
        code = self.returncode
        assert code is not None
        return code

    @property
    def output(self) -> str:
        """What it wrote on stdout."""
        return (self._folder / "out").read_text()

    @property
    def errors(self) -> str:
        """What it wrote on stderr."""
        return (self._folder / "err").read_text()

    def finish(self) -> dict[str, Any]:
        """The summary of a process that must end well."""
        code = self.wait()
        assert code == 0, f"exit code {code}: {self.errors[-3000:]}"
        return json.loads(self.output)

    def is_stopped(self) -> bool:
        """Whether SIGSTOP holds it."""
        stat = Path(f"/proc/{self.pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "T"


class Forks:
    """Starts processes, which end with it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forks")
        self._count = 0
        self.exits: dict[int, int] = {}
        self.changed = threading.Condition()
        self._pids: list[int] = []
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment(GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills what still runs."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._folder.cleanup()

    def start(self, function: str, wish: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Fork:
        """A process that ends with the code that `function`, named as "module:name", returns for `wish`."""
        self._count += 1
        folder = Path(self._folder.name, str(self._count))
        folder.mkdir()
        for name in ("out", "err"):
            (folder / name).touch()
        order = {
            "folder": str(folder),
            "function": function,
            "wish": wish,
            "cwd": str(cwd or Path.cwd()),
            "env": dict(environment() if env is None else env),
        }
        assert self._process.stdin is not None
        with self.changed:
            before = len(self._pids)
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            assert self.changed.wait_for(lambda: len(self._pids) > before, 60), "no more forks: their parent is dead"
            return Fork(self, self._pids[before], folder)

    def command(self, script: str, *args: object, cwd: Path, env: Mapping[str, str] | None = None) -> Fork:
        """One of the commands, by its path in the repository."""
        return self.start("forks:run_script", {"script": script, "args": [*map(str, args)]}, cwd, env)

    @property
    def started(self) -> int:
        """How many were started so far."""
        return len(self._pids)

    def kill_after(self, started: int) -> None:
        """Kills those that run of all that were started after the first `started`, and waits until they are gone."""
        with self.changed:
            running = [pid for pid in self._pids[started:] if pid not in self.exits]
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.changed.wait_for(lambda: self.exits.keys() >= set(running), 10)

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


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child: CPU, no hub, the repository importable."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)} | extra


_shared: Forks | None = None


def shared() -> Forks:
    """Those of this test process."""
    global _shared
    if _shared is None:
        _shared = Forks()
    return _shared


@contextmanager
def forks_of_a_test() -> Iterator[None]:
    """At the end the shared forks that were started inside and still run are killed: a stuck one would burn a core."""
    started = 0 if _shared is None else _shared.started
    try:
        yield
    finally:
        if _shared is not None:
            _shared.kill_after(started)


def close_shared() -> None:
    """Ends them."""
    global _shared
    if _shared is not None:
        _shared.close()
    _shared = None


def run_script(wish: dict[str, Any]) -> int:
    """Runs a top-level command in this process, as Python runs the script; returns its exit code."""
    from core.base import fault_points

    sys.argv = [str(REPOSITORY / wish["script"]), *wish["args"]]
    fault = os.environ.get(fault_points.VARIABLE)
    if fault:
        fault_points.arm(fault_points.parse_fault(fault))
    script = Path(sys.argv[0])
    sys.path[:0] = [str(script.parent)]
    runpy.run_path(str(script), run_name="__main__")
    return 0


def _serve() -> None:
    """The parent's own process: has no thread, so that forking it is safe."""
    import shape_checks

    shape_checks.install()
    sys.path[:0] = [str(TESTS / "faults")]
    for name in IMPORTED:
        importlib.import_module(name)
    # What is there by now is everybody's: collecting it would only copy its pages.
    gc.freeze()
    ended, told = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(told)
    children: set[int] = set()
    pending = b""
    while True:
        ready = select.select([0, ended], [], [])[0]
        if ended in ready:
            os.read(ended, 1 << 16)
            while children:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                children.discard(pid)
                print(json.dumps({"exit": pid, "code": os.waitstatus_to_exitcode(status)}), flush=True)
        if 0 not in ready:
            continue
        read = os.read(0, 1 << 16)
        if not read:
            break
        *lines, pending = (pending + read).split(b"\n")
        for line in lines:
            pid = os.fork()
            if not pid:
                os.close(ended)
                os.close(told)
                _be(json.loads(line))
            children.add(pid)
            print(json.dumps({"pid": pid}), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _be(order: dict[str, Any]) -> None:
    """The forked process; does not return."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    folder = Path(order["folder"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        os.environ.clear()
        os.environ.update(order["env"])
        time.tzset()
        os.chdir(order["cwd"])
        module, name = order["function"].split(":")
        code = getattr(importlib.import_module(module), name)(order["wish"])
    except SystemExit as end:
        code = _code_of(end)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        _end(code)


def _code_of(end: SystemExit) -> int:
    """As Python itself does it."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _end(code: int) -> None:
    """What Python does at its end, but for taking everything that was imported apart."""
    import atexit

    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for the threads that are no daemons
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
