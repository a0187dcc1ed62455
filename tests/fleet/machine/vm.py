"""TPU VMs without TPUs: a home folder for each host, and the few programs of a VM that set-up and supervisor call."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPTS = Path(__file__).parents[3] / "scripts"
# Both the VM's python3.12 and, copied, the one of the environment; what would be the extraction runs job.sh.
PYTHON = """\
#!/bin/bash
case "$1 $2" in
"-c "*) exit 0 ;;
"-m venv") mkdir -p "$4/bin" && cp "{bin}/python3.12" "$4/bin/python" ;;
"-m pip") [ "$3" = --version ] || echo "$@" >>"$HOME/pip.log" ;;
*/extract_activations.py*)
    shift
    printf '%s\\n' "worker=${{TPU_WORKER_ID:-}}" "$@" >"$HOME/ran"
    . "{bin}/job.sh" ;;
esac
"""
RUN_UNTIL_TOLD = "trap 'exit 143' TERM\nwhile [ ! -e {bin}/done ]; do sleep 0.05; done\nexit 0\n"


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def write_vm(folder: Path, job: str = RUN_UNTIL_TOLD) -> None:
    """The programs of a VM in `folder`; `job` is what the extraction does."""
    write_program(folder / "python3.12", PYTHON.format(bin=folder))
    write_program(folder / "hostname", '#!/bin/sh\necho "${FAKE_HOST:-here}"\n')
    write_program(folder / "gcloud", "#!/bin/sh\n[ \"$5\" = --secret=my-token ] && printf 'value of the secret'\n")
    (folder / "job.sh").write_text(job.replace("{bin}", str(folder)))


@contextmanager
def stopped_at_the_end(hosts: Path) -> Iterator[None]:
    """Whatever a test starts below `hosts` ends with it."""
    try:
        yield
    finally:
        for supervisor in hosts.rglob("supervisor"):
            subprocess.run(["bash", SCRIPTS / "supervise.sh", "stop", "--dir", supervisor.parent], capture_output=True)


def until(condition: Callable[[], object], timeout_s: float = 30) -> None:
    """Waits for something that has to happen."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def command_lines() -> str:
    """What every process of this machine was started with."""
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(process.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it ended
    return "\n".join(lines)


def supervise(folder: Path, verb: str, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """One call of supervise.sh for the folder of a host."""
    call = ["bash", str(SCRIPTS / "supervise.sh"), verb, "--dir", str(folder), *words]
    return subprocess.run(call, capture_output=True, text=True, env=os.environ | environment, check=False, timeout=90)
