"""Calls of gcloud: their arguments, time limits and retries, and what their failures mean."""

import logging
import os
import random
import shlex
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from core.base.errors import RunError
from fleet.gcloud.listing import (
    FLEET_LABEL,
    WORKER_LABEL,
    Inventory,
    Kind,
    Resource,
    inventory,
    parse_description,
    parse_list,
)
from fleet.gcloud.machines import Machine, Slot
from fleet.gcloud.parallel import each

_TPUS = ("compute", "tpus")
_COLLECTION = {Kind.NODE: "tpu-vm", Kind.QUEUED: "queued-resources"}
_LONGEST_DELAY_S = 300.0
# Many calls run at once, so none of them may ask the user.
_ENVIRONMENT = {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}


class Failure(Enum):
    """What a failed call means."""

    CAPACITY = "no capacity"
    TRANSIENT = "transient"
    EXISTS = "exists"
    GONE = "gone"
    REFUSED = "refused"


# The first match decides. Waiting does not restore a quota, but a stockout may end.
_MEANINGS = (
    (Failure.EXISTS, ("already_exists", "already exists")),
    (Failure.GONE, ("not_found", "was not found", "not found:")),
    (Failure.REFUSED, ("permission_denied", "unauthenticated", "invalid_argument", "quota limit", "quota '")),
    (Failure.CAPACITY, ("no more capacity", "insufficient capacity", "stockout", "resource_exhausted")),
    (Failure.CAPACITY, ("resource_pool_exhausted", "reserved capacity")),
    (Failure.TRANSIENT, ("unavailable", "deadline", "internal error", "timed out", "time-out", "try again")),
    (
        Failure.TRANSIENT,
        ("connectionerror", "connection refused", "connection reset", "connection closed", "temporarily", "rate limit"),
    ),
    (Failure.TRANSIENT, ("too many requests", "httperror 5", "httperror: 5", "http error 5")),
)
_SSH_FAILED = 255
_READING_TAKES_S = 120.0


class GcloudError(RunError):
    """A call that failed, after its last retry."""

    def __init__(self, message: str, failure: Failure) -> None:
        super().__init__(message)
        self.failure = failure


def meaning_of(stderr: str, code: int = 1) -> Failure:
    """The meaning of gcloud's message; ssh's own exit code means that the host was not reached."""
    text = stderr.lower()
    for failure, patterns in _MEANINGS:
        if any(pattern in text for pattern in patterns):
            return failure
    return Failure.TRANSIENT if code == _SSH_FAILED else Failure.REFUSED


@dataclass(frozen=True)
class Patience:
    """How often a call is repeated and how long one may take, in seconds."""

    max_retries: int = 3
    retry_delay_s: float = 10.0
    timeout_s: float = 1800.0


class Gcloud:
    """gcloud for one project, with time limits, retries and a way to stop all calls."""

    def __init__(self, project: str | None, patience: Patience, *, dry_run: bool = False) -> None:
        self.project = project
        self.patience = patience
        self.dry_run = dry_run
        self._stopped = threading.Event()
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()

    def inventory(self, zones: Sequence[str]) -> Inventory:
        """Everything in the zones, of both kinds. Raises RunError when any part cannot be read or understood."""
        pairs = [(kind, zone) for zone in zones for kind in Kind]
        lists = each(pairs, lambda pair: self._list(*pair), on_interrupt=self.stop)
        return inventory(resource for resources in lists for resource in resources)

    def _list(self, kind: Kind, zone: str) -> tuple[Resource, ...]:
        text = self._read(self._command(kind, "list", zone, "--format=json"))
        return parse_list(text, kind, zone)

    def describe(self, kind: Kind, slot: Slot) -> Resource | None:
        """The resource as it is now; None when it is gone."""
        try:
            text = self._read(self._command(kind, "describe", slot.zone, "--format=json", name=slot.name))
        except GcloudError as error:
            if error.failure is Failure.GONE:
                return None
            raise
        return parse_description(text, kind, slot.zone)

    def create(self, fleet: str, slot: Slot, machine: Machine, service_account: str | None) -> None:
        """Asks for a TPU and waits for it, or puts it into the queue. Raises GcloudError."""
        kind = Kind.QUEUED if machine.queued else Kind.NODE
        flags = [
            f"--accelerator-type={machine.tpu_type}",
            f"--labels={FLEET_LABEL}={fleet},{WORKER_LABEL}={slot.worker_id}",
        ]
        if machine.queued:
            flags += [f"--runtime-version={machine.runtime}", f"--node-id={slot.name}"]
        else:
            flags += [f"--version={machine.runtime}"]
        if machine.spot:
            flags += ["--spot"]
        if service_account is not None:
            flags += [f"--service-account={service_account}"]
        self._change(self._command(kind, "create", slot.zone, *flags, name=slot.name))

    def delete(self, kind: Kind, slot: Slot) -> None:
        """Deletes a node, or a queued resource with its node; if it is gone already, that is not an error."""
        flags = ("--force",) if kind is Kind.QUEUED else ()
        try:
            self._change(self._command(kind, "delete", slot.zone, *flags, "--quiet", name=slot.name))
        except GcloudError as error:
            if error.failure is not Failure.GONE:
                raise

    def copy(self, source: str, slot: Slot, target: str) -> None:
        """Copies a local file to the home directory of all hosts of a TPU."""
        flags = ("--worker=all", "--quiet", source, f"{slot.name}:{target}")
        self._change(self._command(Kind.NODE, "scp", slot.zone, *flags))

    def ssh(self, slot: Slot, script: str, *, hosts: str = "all") -> str:
        """The output of a shell script on the hosts of a TPU."""
        return self._change(self.ssh_command(slot, script, hosts))

    def ssh_command(self, slot: Slot, script: str | None, hosts: str) -> list[str]:
        """The arguments of gcloud that run a script on hosts of a TPU, or open a shell without one."""
        command = () if script is None else (f"--command={script}",)
        quiet = () if script is None else ("--quiet",)
        return self._command(Kind.NODE, "ssh", slot.zone, f"--worker={hosts}", *quiet, *command, name=slot.name)

    def attached(self, arguments: Sequence[str]) -> int:
        """Runs a call on this terminal and returns its exit code."""
        if self.dry_run:
            _would_run(arguments)
            return 0
        try:
            return subprocess.run(["gcloud", *arguments], check=False).returncode
        except FileNotFoundError as error:
            raise _missing() from error

    def stop(self) -> None:
        """Ends the running calls and refuses further ones."""
        self._stopped.set()
        with self._lock:
            for process in self._running:
                _end(process)

    def _command(self, kind: Kind, verb: str, zone: str, *flags: str, name: str | None = None) -> list[str]:
        project = [] if self.project is None else [f"--project={self.project}"]
        names = [] if name is None else [name]
        return [*_TPUS, _COLLECTION[kind], verb, *names, f"--zone={zone}", *project, *flags]

    def _change(self, arguments: Sequence[str]) -> str:
        if self.dry_run:
            _would_run(arguments)
            return ""
        return self._repeated(arguments, self.patience.timeout_s)

    def _read(self, arguments: Sequence[str]) -> str:
        return self._repeated(arguments, min(_READING_TAKES_S, self.patience.timeout_s))

    def _repeated(self, arguments: Sequence[str], timeout_s: float) -> str:
        for attempt in range(self.patience.max_retries + 1):
            try:
                return self._once(arguments, timeout_s)
            except GcloudError as error:
                last = attempt == self.patience.max_retries
                if last or error.failure not in (Failure.CAPACITY, Failure.TRANSIENT):
                    raise
                delay = min(self.patience.retry_delay_s * 2**attempt, _LONGEST_DELAY_S) * random.uniform(0.75, 1.25)
                logging.warning("%s; again in %.0f s", error, delay)
                self._stopped.wait(delay)
        raise AssertionError("the last attempt returns or raises")

    def _once(self, arguments: Sequence[str], timeout_s: float) -> str:
        what = " ".join(arguments[2:5])
        process = self._start(arguments)
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            _end(process)
            process.communicate()
            raise GcloudError(f"{what}: no answer in {timeout_s:g} s", Failure.TRANSIENT) from error
        finally:
            with self._lock:
                self._running.discard(process)
        if self._stopped.is_set():
            raise GcloudError(f"{what}: interrupted", Failure.REFUSED)
        if process.returncode:
            failure = meaning_of(stderr, process.returncode)
            raise GcloudError(f"{what}: {_error_line(stderr) or f'exit code {process.returncode}'}", failure)
        return stdout

    def _start(self, arguments: Sequence[str]) -> "subprocess.Popen[str]":
        # In a new session, because gcloud is a shell script around the process that does the work.
        with self._lock:
            if self._stopped.is_set():
                raise GcloudError("interrupted", Failure.REFUSED)
            try:
                process = subprocess.Popen(
                    ["gcloud", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    env=os.environ | _ENVIRONMENT,
                    start_new_session=True,
                )
            except FileNotFoundError as error:
                raise _missing() from error
            self._running.add(process)
            return process


def _would_run(arguments: Sequence[str]) -> None:
    logging.info("would run: gcloud %s", shlex.join(arguments))


def _missing() -> RunError:
    return RunError("gcloud is not installed: see https://cloud.google.com/sdk/docs/install")


def _end(process: "subprocess.Popen[str]") -> None:
    """Kills gcloud and its children. The operation that it waited for continues in the cloud."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _error_line(stderr: str) -> str:
    """gcloud's error in one line, without its progress and without the advice after a blank line."""
    _, separator, error = stderr.rpartition("ERROR: ")
    return " ".join((error.partition("\n\n")[0] if separator else stderr).split())[-500:]
