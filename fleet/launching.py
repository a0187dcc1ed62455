"""Starts the extraction on ready TPUs: code, environment, supervisor. Launching again does not start it twice."""

import hashlib
import logging
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from core.base.errors import RunError, UsageError
from fleet.bundle import Bundle
from fleet.decisions import Decision
from fleet.gcloud.accelerators import hosts_of
from fleet.gcloud.calls import Gcloud
from fleet.gcloud.parallel import each

# Flags of the extraction that launch sets: the fleet numbers workers, and JAX numbers the hosts of a slice.
_FLAGS_OF_THE_FLEET = ("--worker_id", "--host_id")
_MARK = "activations-host"
_PROBE = f"""\
script="$HOME/activations/code/scripts/supervise.sh"
if [ -f "$script" ]; then bash "$script" status --dir "$HOME/activations"
else echo "{_MARK} $(hostname) absent - -"; fi"""
_START = """\
set -eu
dir="$HOME/activations"
code="$dir/code-{digest}"
mkdir -p "$code"
tar -xzf "$HOME/{archive}" -C "$code"
ln -sfn "$code" "$dir/code"
bash "$code/scripts/setup_tpu_vm.sh" --dir "$dir"
{stop}bash "$code/scripts/supervise.sh" start --dir "$dir" {options} -- \
"$dir/venv/bin/python" "$code/extract_activations.py" {flags}"""


class ExtractionState(StrEnum):
    """The state of the extraction on a TPU."""

    STARTED = "started"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"
    OTHER = "runs something else"
    UNREACHABLE = "unreachable"
    DRY_RUN = "dry run"


@dataclass(frozen=True)
class ExtractionCommand:
    """What every worker runs: the flags of extract_activations.py, the secrets by variable, and the code."""

    flags: tuple[str, ...]
    secrets: tuple[tuple[str, str], ...]
    bundle: Bundle

    @property
    def id(self) -> str:
        """A hash of the job, by which it is recognized on a TPU."""
        return hashlib.sha256(repr((self.flags, self.secrets, self.bundle.digest)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class HostState:
    """One host's supervisor: its state in supervise.sh, the job it belongs to, and a detail."""

    host: str
    state: str
    job: str
    detail: str


@dataclass(frozen=True)
class Launched:
    """The result of launching on one TPU."""

    decision: Decision
    extraction: ExtractionState
    message: str

    @property
    def ok(self) -> bool:
        """Whether the extraction runs or has finished."""
        return self.extraction in (
            ExtractionState.STARTED,
            ExtractionState.RUNNING,
            ExtractionState.FINISHED,
            ExtractionState.DRY_RUN,
        )

    def line(self) -> str:
        """The result as a log line."""
        return f"{self.decision.slot.name} (worker {self.decision.slot.worker_id}): {self.extraction}: {self.message}"

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        slot = self.decision.slot
        state = {"extraction": str(self.extraction), "message": self.message}
        return {"name": slot.name, "zone": slot.zone, "worker_id": slot.worker_id} | state


def require_flags(flags: Sequence[str]) -> None:
    """Raises UsageError for flags of extract_activations.py that the fleet sets."""
    for flag in flags:
        if flag.partition("=")[0] in _FLAGS_OF_THE_FLEET:
            raise UsageError(f"{flag.partition('=')[0]} is set by launch for each worker: leave it out")


def flags_of_worker(flags: Sequence[str], worker_id: int, hosts: int) -> tuple[list[str], dict[str, str]]:
    """Flags and environment of one worker; {worker_id} and {worker_id:03d} in a flag become its number.

    On a slice of several hosts the number is a flag: there TPU_WORKER_ID belongs to libtpu and numbers the hosts.
    """

    def number(match: re.Match[str]) -> str:
        return str(worker_id).zfill(int(match[1] or 0))

    own = [re.sub(r"\{worker_id(?::0([1-9])d)?\}", number, flag) for flag in flags]
    if hosts == 1 and "--multihost" not in own:
        return own, {"TPU_WORKER_ID": str(worker_id)}
    multihost = [] if "--multihost" in own else ["--multihost"]
    return [*own, *multihost, "--worker_id", str(worker_id)], {}


def start_script(job: ExtractionCommand, worker_id: int, hosts: int, *, restart: bool) -> str:
    """The shell script that sets a host up and starts the job there."""
    flags, environment = flags_of_worker(job.flags, worker_id, hosts)
    options = ["--id", job.id]
    options += [f"--env={name}={value}" for name, value in environment.items()]
    options += [f"--secret_env={variable}={secret}" for variable, secret in job.secrets]
    return _START.format(
        digest=job.bundle.digest,
        archive=_archive(job),
        stop='bash "$code/scripts/supervise.sh" stop --dir "$dir"\n' if restart else "",
        options=shlex.join(options),
        flags=shlex.join(flags),
    )


def _archive(job: ExtractionCommand) -> str:
    return f"activations-{job.bundle.digest}.tar.gz"


def parse_states(output: str) -> tuple[HostState, ...]:
    """The states that supervise.sh printed, one line for each host."""
    lines = (line.strip().split(maxsplit=4) for line in output.splitlines())
    return tuple(HostState(*parts[1:]) for parts in lines if parts[:1] == [_MARK] and len(parts) == 5)


def state_of(states: Sequence[HostState], job_id: str, hosts: int) -> tuple[ExtractionState | None, str]:
    """The common state of the hosts of one TPU; None when the job has to be started."""
    if len(states) < hosts:
        return ExtractionState.UNREACHABLE, f"{len(states)} of {hosts} hosts answered"
    active = [host for host in states if host.state in ("running", "waiting")]
    for host in active:
        if host.job != job_id:
            return ExtractionState.OTHER, f"{host.host} runs job {host.job}: --restart ends it"
    ours = [host for host in states if host.job == job_id]
    for word, extraction in (("failed", ExtractionState.FAILED), ("stopped", ExtractionState.STOPPED)):
        for host in ours:
            if host.state == word:
                return extraction, f"{host.host}: {host.detail}"
    if len(ours) == hosts and all(host.state == "finished" for host in ours):
        return ExtractionState.FINISHED, ours[0].detail
    if len(ours) == hosts and all(host.state in ("running", "waiting", "finished") for host in ours):
        return ExtractionState.RUNNING, active[0].detail
    return None, "not running"


def launch(
    gcloud: Gcloud, job: ExtractionCommand, decisions: Sequence[Decision], *, restart: bool = False, again: bool = True
) -> tuple[Launched, ...]:
    """Starts the job on the TPUs of the decisions, which must be ready.

    restart: first ends another job that runs there. again: restarts a job that gave up or that a user stopped.
    """
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / _archive(job)
        archive.write_bytes(job.bundle.content)

        def one(decision: Decision) -> Launched:
            try:
                launched = _launch_one(gcloud, job, decision, archive, restart, again)
            except RunError as error:
                launched = Launched(decision, ExtractionState.UNREACHABLE, str(error))
            logging.info(launched.line())
            return launched

        return tuple(each(decisions, one, on_interrupt=gcloud.stop))


def _launch_one(
    gcloud: Gcloud, job: ExtractionCommand, decision: Decision, archive: Path, restart: bool, again: bool
) -> Launched:
    assert decision.machine is not None, "a ready TPU has a machine"
    slot, hosts = decision.slot, hosts_of(decision.machine.tpu_type)
    if not gcloud.dry_run and not restart:
        extraction, message = state_of(parse_states(gcloud.ssh(slot, _PROBE)), job.id, hosts)
        startable = again and extraction in (ExtractionState.FAILED, ExtractionState.STOPPED)
        if extraction is not None and not startable:
            return Launched(decision, extraction, message)
    gcloud.copy(str(archive), slot, archive.name)
    output = gcloud.ssh(slot, start_script(job, slot.worker_id, hosts, restart=restart))
    if gcloud.dry_run:
        return Launched(decision, ExtractionState.DRY_RUN, f"job {job.id} on {hosts} host(s)")
    extraction, message = state_of(parse_states(output), job.id, hosts)
    if extraction is ExtractionState.RUNNING:
        return Launched(decision, ExtractionState.STARTED, f"job {job.id} on {hosts} host(s)")
    return Launched(decision, extraction or ExtractionState.FAILED, message)
