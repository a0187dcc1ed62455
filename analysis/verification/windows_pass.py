"""The pass that reads and checks every committed window."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.passes import PartFacts, PartialStore, RunnerChoice, run_pass
from analysis.verification.window_checks import CheckedWindow, check_window
from core.base.canonical_json import content_hash
from core.commit.record import CommitRecord
from core.object_store.shared import shared_store

Checked = tuple[CheckedWindow, ...]


@dataclass(frozen=True)
class CommittedWindow:
    """Attributes:
    root: path or URL of the output. folder: the worker's below it. format: of the shards.
    """

    root: str
    folder: str
    record: CommitRecord
    format: str


@dataclass(frozen=True)
class WindowsPass:
    """Its partials are what `check_window` finds, window by window."""

    name: str = "verify"
    version: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)

    def facts(self, part: CommittedWindow) -> PartFacts:
        """See `Pass`."""
        identity = [part.folder, part.format, content_hash(part.record.to_bytes().decode())]
        n_bytes = sum(file.bytes for file in part.record.files)
        return PartFacts(f"{part.folder}, window {part.record.window}", n_bytes, identity)

    def map(self, part: CommittedWindow) -> Checked:
        """Problems are findings, not errors."""
        return (check_window(shared_store(part.root), part.folder, part.record, part.format),)

    def merge(self, a: Checked, b: Checked) -> Checked:
        """Side by side."""
        return a + b

    def finish(self, partial: Checked) -> Checked:
        """All windows, in order."""
        return partial

    def pack(self, partial: Checked) -> bytes:
        """JSON; the numbers of samples as base64 of int64."""
        found = [{"samples": _text(window.sample_idx), "problems": window.problems} for window in partial]
        return json.dumps(found).encode()

    def unpack(self, data: bytes) -> Checked:
        """The inverse of `pack`."""
        return tuple(CheckedWindow(_numbers(each["samples"]), tuple(each["problems"])) for each in json.loads(data))


def check_windows(windows: Sequence[CommittedWindow], runner: RunnerChoice, partials: PartialStore | None) -> Checked:
    """Checks each window, in order. Partials are removed at the end, because files may change afterwards."""
    if not windows:
        return ()
    checked = run_pass(WindowsPass(), windows, runner=runner, partials=partials)
    if partials is not None:
        partials.remove(WindowsPass())
    return checked


def _text(numbers: Iterable[int]) -> str:
    return base64.b64encode(np.array(list(numbers), np.int64).tobytes()).decode()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(np.frombuffer(base64.b64decode(text), np.int64).tolist())
