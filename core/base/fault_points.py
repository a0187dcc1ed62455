"""Named points in the claim and commit protocols at which tests kill, stop or fail a process.

In production `fault_point` is one comparison. With `ACTIVATIONS_FAULT=commit.before@2=kill` in its environment, a
process is killed when it reaches the point `commit.before` for the second time.
"""

import errno
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable

VARIABLE = "ACTIVATIONS_FAULT"
POINTS = (
    "claim.before",
    "claim.after",
    "beat.before",
    "beat.after",
    "failure.before",
    "failure.after",
    "release.before",
    "release.after",
    "declare.before",
    "declare.after",
    "encode.after",
    "store.before",
    "store.after",
    "mirror.before",
    "mirror.after",
    "commit.before",
    "commit.after",
    "index.before",
    "index.after",
    "checkpoint.before",
    "checkpoint.after",
    "disk.synced",
    "disk.linked",
    "bucket.chunk",
    "bucket.sent",
)

_hit: Callable[[str], None] | None = None


def fault_point(name: str) -> None:
    """Does nothing unless a test has armed the process."""
    if _hit is not None:
        _hit(name)


def arm(hit: Callable[[str], None] | None) -> None:
    """Calls `hit(name)` at every point from now on; None disarms."""
    global _hit
    _hit = hit


def at(point: str, count: int, act: Callable[[], None]) -> Callable[[str], None]:
    """A function for `arm` that calls `act` once: the `count`-th time (from 1) that `point` is reached."""
    if point not in POINTS:
        raise ValueError(f"{point!r} is not one of {', '.join(POINTS)}")
    seen: Counter[str] = Counter()
    lock = threading.Lock()

    def hit(name: str) -> None:
        with lock:
            seen[name] += 1
            is_due = name == point and seen[name] == count
        if is_due:
            act()

    return hit


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hang() -> None:
    while True:
        time.sleep(60)


def _fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


ACTIONS: dict[str, Callable[[], None]] = {"kill": _die, "stop": _freeze, "hang": _hang, "full": _fill_disk}


def parse_fault(text: str) -> Callable[[str], None]:
    """A function for `arm`, from `POINT@COUNT=ACTION`."""
    place, _, action = text.partition("=")
    point, _, count = place.partition("@")
    return at(point, int(count), ACTIONS[action])


if VARIABLE in os.environ:
    arm(parse_fault(os.environ[VARIABLE]))
