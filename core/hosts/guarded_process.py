"""Runs the work in a child process, where a runtime may abort the process it runs in."""

import ctypes
import os
import signal
from contextlib import suppress

from absl import logging

_PR_SET_PDEATHSIG = 1  # prctl.h


def fork_under_guard() -> int | None:
    """None in a new child, which goes on with the work; in the guard, once the child has ended, the exit code.

    JAX's coordination service aborts a process when another host is gone, with its own reason and a stack trace: the
    guard then says in a line what that means. It passes SIGTERM and Ctrl-C on, and its own end is the child's too.
    Must come before the first thread.
    """
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        _end_with(guard)
        # Ctrl-C reaches the guard alone, which passes it on: twice would mean to stop at once.
        os.setpgid(0, 0)
        return None

    def pass_on(number: int, _: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGABRT:
        logging.error(
            "JAX has ended this host, its reason is above: most often another host died or never came; "
            "the same command on all hosts goes on behind the last commit"
        )
        return 1
    return code if code >= 0 else 128 - code


def _end_with(guard: int) -> None:
    """Has the kernel kill this process when the guard dies. Linux alone can; elsewhere the child would live on."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:
        os._exit(1)
