"""A process that is asked to stop ends in time, whatever it is doing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import sys, time
from core.base.signals import stop_on_signals
grace_s, works_s = map(float, sys.argv[1:])
with stop_on_signals(grace_s, log=lambda text: print(text, flush=True), peer_stopping=lambda: True) as stop:
    assert stop.wait(10)
    time.sleep(works_s)
"""


def start(grace_s: float, works_s: float) -> subprocess.Popen[str]:
    """A host that works on after another host requested a stop."""
    command = [sys.executable, "-c", PROGRAM, str(grace_s), str(works_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])


def test_a_host_that_is_told_to_stop_and_cannot_ends_after_its_grace_as_after_sigterm():
    host = start(0.5, 60)
    said, _ = host.communicate(timeout=10)
    assert host.returncode == 128 + signal.SIGTERM
    assert "another host is stopping: committing what is computed, then stopping" in said
    assert "SIGTERM: dropping uncommitted work" in said


def test_a_host_that_is_told_to_stop_and_does_ends_as_it_would():
    host = start(5, 0)
    assert host.wait(timeout=10) == 0


def test_the_sigterm_that_follows_is_the_one_that_it_was_told_of():
    host = start(20, 1.5)
    assert host.stdout is not None
    assert "another host is stopping" in host.stdout.readline()
    time.sleep(0.3)
    host.send_signal(signal.SIGTERM)
    assert host.wait(timeout=10) == 0
