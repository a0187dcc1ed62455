"""Runs the work in a child process, because JAX's runtime may abort the process that it runs in."""

import ctypes
import os
import signal
from contextlib import suppress

from absl import logging

_PR_SET_PDEATHSIG = 1  # prctl.h


def fork_under_guard() -> int | None:
    """None in the new child, which continues with the work; in the guard, once the child has ended, its exit code.

    JAX's coordination service aborts a process when another host is gone, with its own reason and a stack trace: the
    guard then explains it in one line. It forwards SIGTERM and Ctrl-C, and the child dies with it.
    Must be called before the first thread starts.
    """
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        _die_with(guard)
        # Ctrl-C must reach the guard alone, which forwards it: a second signal would mean to stop at once.
        os.setpgid(0, 0)
        return None

    def forward(signum: int, _: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, forward)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGABRT:
        logging.error(
            "JAX aborted this host for the reason above; usually another host died or never joined: "
            "run the same command on all hosts to continue after the last commit"
        )
        return 1
    return code if code >= 0 else 128 - code


def _die_with(guard: int) -> None:
    """Makes the kernel kill this process when the guard dies. Linux only; elsewhere the child would live on."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:
        os._exit(1)
