"""Scripted faults: which calls are hit, how often, and what happens to them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Call:
    """One request as the faults see it.

    kind is `bucket.{insert,get,list,delete}`, `object.{list,get,media,delete,patch,rewrite,copy,compose,move}`,
    `upload.{media,multipart,start,chunk,query,cancel}`, `batch` or `unknown`. path is still percent-encoded. object is
    the name of the object that is asked for or written; empty where there is none.
    """

    method: str
    path: str
    kind: str
    query: dict[str, str]
    object: str = ""


@dataclass(frozen=True)
class Action:
    """What a fault does; the subclasses are the vocabulary."""


@dataclass(frozen=True)
class Status(Action):
    """Answer with this error and do nothing else."""

    code: int


@dataclass(frozen=True)
class Reset(Action):
    """Reset the connection before doing anything."""


@dataclass(frozen=True)
class Stall(Action):
    """Wait, then answer as usual. Ends early when the server is closed."""

    seconds: float


@dataclass(frozen=True)
class CommitThenStatus(Action):
    """Carry the request out, then claim that it failed: the lost acknowledgement."""

    code: int = 503


@dataclass(frozen=True)
class CommitThenReset(Action):
    """Carry the request out, then reset the connection instead of answering."""


@dataclass(frozen=True)
class TruncateBody(Action):
    """Announce the whole body, send only this share of it, close."""

    share: float = 0.5


@dataclass(frozen=True)
class CorruptUpload(Action):
    """Flip one bit of the received media before it is stored: damage on the way, with a matching stored checksum."""

    offset: int = 0


@dataclass(frozen=True)
class PersistPart(Action):
    """Keep only the first bytes of a resumable chunk; then answer 308 with what was kept, or this error."""

    n_bytes: int
    code: int = 308


@dataclass
class _Fault:
    matches: Callable[[Call], bool]
    action: Action
    times: int | None
    probability: float
    draw: random.Random


@dataclass
class Faults:
    """The faults of one server; the first one that matches a call and still has lives left is taken."""

    _faults: list[_Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    taken: int = 0

    def add(
        self,
        match: str | tuple[str, str] | Callable[[Call], bool],
        action: Action,
        times: int | None = 1,
        probability: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Hit the calls that `match`: a kind or its prefix ("upload"), (method, part of the path), or a function.

        times: how many calls are hit at most, None for all; probability: of hitting one, drawn from `seed`.
        """
        self._faults.append(_Fault(_matcher(match), action, times, probability, random.Random(seed)))

    def clear(self) -> None:
        """Forget every fault."""
        with self._lock:
            self._faults.clear()

    def take(self, call: Call) -> Action | None:
        """The fault that this call meets, if any; counts it."""
        with self._lock:
            for fault in self._faults:
                if fault.times == 0 or not fault.matches(call) or fault.draw.random() >= fault.probability:
                    continue
                if fault.times is not None:
                    fault.times -= 1
                self.taken += 1
                return fault.action
        return None


def _matcher(match: str | tuple[str, str] | Callable[[Call], bool]) -> Callable[[Call], bool]:
    if callable(match):
        return match
    if isinstance(match, str):
        return lambda call: call.kind == match or call.kind.startswith(match + ".")
    method, part = match
    return lambda call: call.method == method and part in call.path
